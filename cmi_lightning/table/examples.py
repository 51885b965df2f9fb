"""Which images a report shows: the first of each task, and those that CMI changed most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from cmi_lightning.paths import inside
from cmi_lightning.report.results import Change, Comparison, Example, Extremes, Metric
from cmi_lightning.table.cells import Key, StartedCell
from cmi_lightning.table.spec import Table

EXTREMES = 3  # best and worst images shown of a cell
Kind = Literal["truth", "measurement", "restored"]


def _picture(table: Table, started: StartedCell, kind: Kind, name: str) -> str | None:
    """Return the path of one of an image's files, relative to the table's folder."""
    path = inside(started.cell.folder / kind, name, ".png")
    return path.relative_to(table.folder).as_posix() if path.is_file() else None


def examples(table: Table, cells: Mapping[Key, StartedCell]) -> dict[str, tuple[Example, ...]]:
    """Return the first images that all cells of a task have."""
    shown = {}
    for task in dict.fromkeys(key[0] for key in cells):
        of_task = {key[1:]: started for key, started in cells.items() if key[0] == task}
        first = next(iter(of_task.values()))
        common = [n for n in first.records if all(n in c.records for c in of_task.values())]
        entries = []
        for name in common[: table.examples]:
            restored: dict[str, dict[str, str | None]] = defaultdict(dict)
            for (method, variant), started in of_task.items():
                restored[method][variant] = _picture(table, started, "restored", name)
            truth = _picture(table, first, "truth", name)
            measurement = _picture(table, first, "measurement", name)
            entries.append(Example(name, truth, measurement, dict(restored)))
        shown[task] = tuple(entries)
    return shown


def extremes(
    table: Table,
    cells: Mapping[Key, StartedCell],
    comparisons: Sequence[Comparison],
    metrics: Sequence[Metric],
) -> tuple[Extremes, ...]:
    """Return the images that CMI changed most, for better and worse, in every row."""
    shown = []
    for comparison in comparisons:
        metric = next((m for m in metrics if m.per_image and m.key in comparison.metrics), None)
        if (comparison.variant, comparison.against) != ("cmi", "base") or metric is None:
            continue
        task, method = comparison.task, comparison.method
        one, other = cells[task, method, "cmi"], cells[task, method, "base"]
        mine, theirs = one.values(metric.key), other.values(metric.key)
        changes = {name: mine[name] - theirs[name] for name in mine if name in theirs}
        order = sorted(changes, key=lambda name: -metric.sign * changes[name])

        pictures: list[tuple[StartedCell, Kind]] = [(one, "truth"), (one, "measurement")]
        pictures += [(other, "restored"), (one, "restored")]
        best, worst = (
            tuple(Change(n, changes[n], *(_picture(table, *p, n) for p in pictures)) for n in names)
            for names in (order[:EXTREMES], order[: -EXTREMES - 1 : -1])
        )
        shown.append(Extremes(task, method, metric.key, best, worst))
    return tuple(shown)
