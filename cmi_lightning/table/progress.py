"""A line per finished cell, with the time left."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from cmi_lightning.report.results import Variant
from cmi_lightning.table.records import records
from cmi_lightning.table.run import FinishedCell, Job
from cmi_lightning.table.spec import Table

SKIPPED = "skipped"  # the kind of cells in which nothing is left to restore
Kind = Variant | str


def first_process() -> bool:
    """Whether this is the first of several processes, or the only one.

    Lightning starts further ranks with the command itself: each goes over all cells.
    """
    from lightning.pytorch.utilities import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


class ProgressPrinter:
    """Prints a line per finished cell, with the time left.

    The time left counts images that are still to be restored, by the seconds that an image of the
    variant has taken so far; cells that are finished already take what such a cell has taken.

    Args:
        table: the table.
        total: how many times a cell is run, in all rounds.
    """

    def __init__(self, table: Table, total: int) -> None:
        self.table, self.total, self.count = table, total, 0
        self.started = time.monotonic()
        self.done: dict[Path, int] = {}  # images that a cell has, once what is planned is done
        self.left: dict[tuple[Path, int], tuple[Kind, int]] = {}
        self.spent: dict[Kind, list[float]] = defaultdict(lambda: [0.0, 0.0])  # seconds, images

    def expect(self, jobs: Sequence[Job]) -> None:
        """Plan for jobs, in the order in which they are run."""
        for cell, images in ((cell, job.images) for job in jobs for cell in job.cells):
            images = self.table.limit(cell.variant, images)
            done = self.done.setdefault(cell.folder, len(records(cell.folder)))
            self.done[cell.folder] = max(done, images)
            kind: Kind = cell.variant if images > done else SKIPPED
            self.left[cell.folder, images] = kind, max(images - done, 1)

    def seconds_left(self) -> float:
        """Return the seconds that what is left will take."""
        work = {kind: seconds for kind, (seconds, _) in self.spent.items() if kind != SKIPPED}
        images = sum(images for kind, (_, images) in self.spent.items() if kind != SKIPPED)
        mean = sum(work.values()) / images if images else 0.0
        rates: dict[Kind, float] = defaultdict(lambda: mean)
        rates |= {kind: seconds / n for kind, (seconds, n) in self.spent.items()}
        rates.setdefault(SKIPPED, 0.0)
        planned = sum(count * rates[kind] for kind, count in self.left.values())
        unplanned = self.total - self.count - len(self.left)  # `tune` plans CMI after its bases
        seconds = sum(seconds for seconds, _ in self.spent.values())
        at_a_time = max(1.0, seconds / max(time.monotonic() - self.started, 1e-9))
        return (planned + unplanned * seconds / max(self.count, 1)) / at_a_time

    def __call__(self, finished: FinishedCell) -> None:
        """Print one cell."""
        if not first_process():
            return
        self.count += 1
        kind, images = self.left.pop((finished.cell.folder, finished.images))
        self.spent[kind][0] += finished.seconds
        self.spent[kind][1] += images
        print(
            f"{time.strftime('%H:%M:%S')}  {self.count}/{self.total}  {finished.cell.task}, "
            f"{finished.cell.label}, {finished.images} images, {finished.seconds:.0f} s; "
            f"{self.seconds_left() / 60:.0f} min left",
            flush=True,
        )
