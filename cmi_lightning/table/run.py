"""Running cells: one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmi_lightning.data.files import natural
from cmi_lightning.errors import InputError, first_line
from cmi_lightning.table.spec import Cell, Table, passes

LOG = "log.txt"


@dataclass(frozen=True)
class Job:
    """Cells that one process runs in turn, over at most the first ``images`` images.

    Of a cell of equal cost, the steps follow from what the cell with CMI before it has cost.
    """

    cells: tuple[Cell, ...]
    images: int


@dataclass(frozen=True)
class FinishedCell:
    """A cell that has been run: over how many images, in how many seconds."""

    cell: Cell
    images: int
    seconds: float


def run(table: Table, jobs: Sequence[Job], on_finished: Callable[[FinishedCell], None]) -> None:
    """Run jobs, and hand on every finished cell.

    A job that cannot be run keeps no other from it.

    Raises:
        InputError: after all others, of the first job that could not be run; it names the cell.
    """
    errors: list[InputError] = []
    if table.processes == 1 or len(jobs) < 2:
        for job in jobs:
            try:
                for finished in run_job(table, job):
                    on_finished(finished)
            except InputError as error:
                errors.append(error)
    else:
        with _pool(table) as pool:
            try:
                futures = [pool.submit(_run_whole_job, table, job) for job in jobs]
                for future in as_completed(futures):
                    finished_or_error = future.result()
                    if isinstance(finished_or_error, InputError):
                        errors.append(finished_or_error)
                    else:
                        for finished in finished_or_error:
                            on_finished(finished)
            except BrokenProcessPool as error:
                raise InputError(
                    "A process was killed from outside (is memory short?): set lower processes or "
                    "batch_size and run the same command again; what was finished is kept."
                ) from error
            except BaseException:  # Ctrl-C: nothing is lost by ending at once
                _stop()
                raise
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _pool(table: Table) -> Iterator[ProcessPoolExecutor]:
    """Return processes that share the CPU's cores."""
    threads = max(1, (os.cpu_count() or 1) // table.processes)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a process starts
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            table.processes, context, initializer=_start, initargs=(threads,)
        ) as pool:
            yield pool
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before


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


def _stop() -> None:
    """End all processes; their pool then gives up what is left, which needs no cancelling."""
    for process in multiprocessing.active_children():
        process.kill()


def _run_whole_job(table: Table, job: Job) -> list[FinishedCell] | InputError:
    try:
        return list(run_job(table, job))
    except InputError as error:
        return InputError(str(error))


def run_job(table: Table, job: Job) -> Iterator[FinishedCell]:
    """Run a job's cells in this process.

    Raises:
        InputError: naming the cell that could not be run.
    """
    for cell in job.cells:
        started = time.monotonic()
        cell = at_equal_cost(table, cell)
        images = table.limit(cell.variant, job.images)
        restore(table.arguments(cell, images), cell)
        yield FinishedCell(cell, images, time.monotonic() - started)


def at_equal_cost(table: Table, cell: Cell) -> Cell:
    """Return a cell of equal cost with its number of steps, or any other cell as it is.

    The steps are those whose network passes come nearest to what the cell with CMI costs, or those
    that the cell has been run with.
    """
    if cell.variant != "equal":
        return cell
    if own := records(cell.folder, 1):
        return replace(cell, steps=own[0]["steps"])
    base = passes(records(table.cell(cell.task, cell.method).folder, 1))
    cmi = passes(records(table.cell(cell.task, cell.method, "cmi").folder, 1))
    if not base or not cmi:
        return cell
    return replace(cell, steps=max(table.steps, round(table.steps * cmi / base)))


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
            raise InputError(
                f"{name}: {type(error).__name__}: {first_line(error)} (see '{cell.folder / LOG}')."
            ) from error


def records(folder: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's folder, in the order in which it restores its images."""
    found: list[dict[str, Any]] = []
    root = folder / "records"
    names = {p: natural(p.relative_to(root).as_posix()) for p in root.rglob("*.json")}
    for path in sorted(names, key=lambda p: names[p])[:limit]:
        with contextlib.suppress(ValueError):  # a crash of the machine may have cut it short
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
