"""The rows of the table, from which HTML, Markdown, LaTeX and CSV are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cmi_lightning.report.results import ADDED, AGAINST, Cell, Metric, Results, Task
from cmi_lightning.report.verdicts import Verdict, mean_text, verdict
from cmi_lightning.statistics import Estimate

MEASURED = "measurement A⁺y"


@dataclass(frozen=True)
class Entry:
    """A row's mean of a metric, with the verdicts on it by what it is compared with."""

    metric: Metric
    estimate: Estimate | None
    verdicts: Mapping[str, Verdict]

    @property
    def text(self) -> str:
        """The mean and its error."""
        return mean_text(self.estimate, self.metric.digits)


@dataclass(frozen=True)
class Row:
    """A cell, or a task's measurements; ``images`` is told where other cells have more."""

    task: Task
    label: str
    variant: str
    cell: Cell | None
    images: int | None
    entries: list[Entry]

    @property
    def name(self) -> str:
        """The label, with the number of images where that is its own."""
        return self.label + ("" if self.images is None else f", {self.images} images")

    @property
    def added(self) -> bool:
        """Whether the cell has CMI, so that its differences are verdicts on it."""
        return self.variant in ADDED

    @property
    def passes(self) -> float | None:
        """Network passes per image; a measurement needs none."""
        return self.cell.passes if self.cell else 0.0

    @property
    def seconds(self) -> float | None:
        """Seconds per image."""
        return self.cell.seconds if self.cell else None


def rows(results: Results) -> dict[Task, list[Row]]:
    """Return the table's rows, by task."""
    every = {task: list(_rows(results, task)) for task in results.tasks}
    return {task: of_task for task, of_task in every.items() if of_task}


def _rows(results: Results, task: Task) -> Iterator[Row]:
    if measured := results.measured.get(task.key):
        entries = [Entry(metric, measured.get(metric.key), {}) for metric in results.metrics]
        yield Row(task, MEASURED, "measured", None, None, entries)
    for cell in results.cells_of(task.key):
        images = None if cell.images == results.images else cell.images
        entries = [
            Entry(
                metric,
                cell.metrics.get(metric.key),
                {a: v for a in AGAINST if (v := verdict(results, metric, cell, a))},
            )
            for metric in results.metrics
        ]
        yield Row(task, cell.label, cell.variant, cell, images, entries)
