"""Running cells, one after the other or in processes of their own, and a line for each."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from cmi_lightning.errors import InputError, cause, counted
from cmi_lightning.report.results import Variant
from cmi_lightning.table.records import Cell, records
from cmi_lightning.table.spec import Table

LOG = "log.txt"
SKIPPED = "skipped"  # the kind of cells in which nothing is left to restore
Kind = Variant | str
# Cells that one process runs in turn: the steps of one of equal cost follow from what the cell with
# CMI before it has cost.
Job = tuple[Cell, ...]


@dataclass(frozen=True)
class FinishedCell:
    """A cell that has been run, in how many seconds."""

    cell: Cell
    seconds: float


Outcome = FinishedCell | InputError  # the error names the cell


def run(table: Table, jobs: Sequence[Job], on_finished: Callable[[FinishedCell], None]) -> None:
    """Run jobs, and hand on every finished cell.

    A job that cannot be run keeps no other from it.

    Raises:
        InputError: after all others, of the first job that could not be run; it names the cell.
    """
    errors: list[InputError] = []
    several = table.processes > 1 and len(jobs) > 1
    in_turn = (outcome for job in jobs for outcome in run_job(table, job))
    with contextlib.closing(_in_processes(table, jobs) if several else in_turn) as outcomes:
        for outcome in outcomes:  # Ctrl-C ends the processes
            if isinstance(outcome, InputError):
                errors.append(outcome)
            else:
                on_finished(outcome)
    if errors:
        raise errors[0]


def _whole(table: Table, job: Job) -> list[Outcome]:
    return list(run_job(table, job))


def _in_processes(table: Table, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
    """Run jobs in processes that share the CPU's cores."""
    threads = max(1, (os.cpu_count() or 1) // table.processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(table.processes, context, _start, (threads,)) as pool:
        try:
            for future in as_completed([pool.submit(_whole, table, job) for job in jobs]):
                yield from future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "A process was killed from outside (is memory short?): set lower processes or "
                "batch_size and run the same command again; what was finished is kept."
            ) from error
        except BaseException:  # nothing is lost by ending at once
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _start(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone, which it would not notice."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def run_job(table: Table, job: Job) -> Iterator[Outcome]:
    """Run a job's cells in this process, up to the first that cannot be run."""
    try:
        for cell in map(table.at_equal_cost, job):
            started = time.monotonic()
            restore(table.arguments(cell), cell)
            yield FinishedCell(cell, time.monotonic() - started)
    except InputError as error:
        yield InputError(str(error))  # without its cause, which no other process may know


def restore(arguments: list[str], cell: Cell) -> None:
    """Run ``cmi-lightning predict`` with its output in the cell's log.

    Images that fail are told by the records.

    Raises:
        InputError: naming the cell, if it could not be run.
    """
    import lightning.pytorch  # noqa: F401  # before the redirection: its log handler keeps stderr

    from cmi_lightning.predict.command import predict

    cell.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    name = f"{cell.task}, {cell.label}"
    with (cell.folder / LOG).open("a", encoding="utf-8") as log:
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                predict(arguments)
        except InputError as error:
            told = str(error)
            if "trainer.default_root_dir" in told:  # predict's remedy is not this command's
                told = told.partition("Set another")[0] + "Set another output, or delete it."
            raise InputError(f"{name}: {told}") from error
        except Exception as error:
            traceback.print_exc(file=log)
            raise InputError(f"{name}: {cause(error)} (see '{cell.folder / LOG}').") from error


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
        total: how many times a cell is run, in all rounds.
    """

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.started = time.monotonic()
        self.done: dict[Path, int] = {}  # images that a cell has, once what is planned is done
        self.left: dict[tuple[Path, int], tuple[Kind, int]] = {}
        self.spent: dict[Kind, list[float]] = defaultdict(lambda: [0.0, 0.0])  # seconds, images

    def expect(self, jobs: Sequence[Job]) -> None:
        """Plan for jobs, in the order in which they are run."""
        for cell in (cell for job in jobs for cell in job):
            done = self.done.setdefault(cell.folder, len(records(cell.folder)))
            self.done[cell.folder] = max(done, cell.images)
            kind: Kind = cell.variant if cell.images > done else SKIPPED
            self.left[cell.folder, cell.images] = kind, max(cell.images - done, 1)

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
        cell = finished.cell
        kind, images = self.left.pop((cell.folder, cell.images))
        self.spent[kind][0] += finished.seconds
        self.spent[kind][1] += images
        print(
            f"{time.strftime('%H:%M:%S')}  {self.count}/{self.total}  {cell.task}, {cell.label}, "
            f"{counted(cell.images, 'image')}, {finished.seconds:.0f} s; "
            f"{self.seconds_left() / 60:.0f} min left",
            flush=True,
        )
