"""Running cells: one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmi_lightning.errors import InputError
from cmi_lightning.table.spec import Cell, Table, passes

LOG = "log.txt"


@dataclass(frozen=True)
class Job:
    """Cells that one process runs in turn, over the first ``images`` images.

    Of a cell of equal cost, the steps follow from what the cell with CMI before it has cost.
    """

    cells: tuple[Cell, ...]
    images: int


@dataclass(frozen=True)
class Done:
    """A cell that has been run: over how many images, in how many seconds."""

    cell: Cell
    images: int
    seconds: float


def run(table: Table, jobs: Sequence[Job], tell: Callable[[Done], None]) -> None:
    """Run jobs, and tell of every finished cell.

    Raises:
        InputError: naming the first cell that could not be run; others that are under way end.
    """
    if table.processes == 1:
        for job in jobs:
            for done in _run_job(table, job):
                tell(done)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // table.processes)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a process starts
    try:
        with ProcessPoolExecutor(
            table.processes, context, initializer=_start, initargs=(threads,)
        ) as pool:
            futures = [pool.submit(_run_whole_job, table, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    for done in future.result():
                        tell(done)
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _start(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone, which it would not notice."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _run_whole_job(table: Table, job: Job) -> list[Done]:
    return list(_run_job(table, job))


def _run_job(table: Table, job: Job) -> Iterator[Done]:
    for cell in job.cells:
        started = time.monotonic()
        cell = at_equal_cost(table, cell)
        restore(table.arguments(cell, job.images), cell)
        yield Done(cell, job.images, time.monotonic() - started)


def at_equal_cost(table: Table, cell: Cell) -> Cell:
    """Return a cell of equal cost with its number of steps, or any other cell as it is.

    The steps are those whose network passes come nearest to what the cell with CMI costs. Where
    that has no record yet, the steps stay.
    """
    if cell.variant != "equal":
        return cell
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
    from cmi_lightning.cli import predict, resolved

    cell.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with (
            (cell.folder / LOG).open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            predict(resolved(arguments))
    except InputError as error:
        raise InputError(f"{cell.task}, {cell.label}: {error}") from error


def records(folder: Path, limit: float = math.inf) -> list[dict[str, Any]]:
    """Return the records of a run's folder, in the order of ids."""
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "records").rglob("*.json")):
        if len(found) >= limit:
            break
        with contextlib.suppress(ValueError):  # a crash of the machine may have cut it short
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
