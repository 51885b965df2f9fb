"""What the cells' records say together: means, paired differences, costs, images to look at."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cmi_lightning.errors import counted
from cmi_lightning.report import results as reported
from cmi_lightning.report.results import ADDED, Draws, Metric, Results
from cmi_lightning.statistics import Estimate
from cmi_lightning.table.cells import MEASURED, METRICS, Key, StartedCell, started_cells
from cmi_lightning.table.comparisons import Differences, compare
from cmi_lightning.table.records import Cell, passes, read_json
from cmi_lightning.table.resampling import LEVEL
from cmi_lightning.table.spec import Table
from cmi_lightning.table.tune import Study, read_searches

Cells = Mapping[Key, StartedCell]


def aggregate(table: Table, config: str = "", command: str = "") -> Results:
    """Return everything that the report and the tables show.

    Args:
        table: the table; what is not finished is left out.
        config: the configuration as YAML, to be shown.
        command: the command, to be shown.
    """
    cells = started_cells(table)
    estimates = {key: started.estimates() for key, started in cells.items()}
    metrics = _metrics(cells, {name for found in estimates.values() for name in found})
    by_task: dict[str, list[StartedCell]] = defaultdict(list)
    for (task, *_), started in cells.items():
        by_task[task].append(started)
    differences = compare(cells, metrics)
    read = [(cell, read_json(cell.folder / "posterior.json")) for cell in table.posterior_cells()]
    posterior = [(cell, summary) for cell, summary in read if summary]
    study: Study = {}  # what the table uses of it
    for task, name, search, used in read_searches(table):
        if used:
            study.setdefault(task, {})[name] = search
    notes = [*_notes(table, cells, differences, study), *_notes_on_draws(posterior)]
    draws = {(c.task, c.method, c.variant): _draws(table, c, summary) for c, summary in posterior}
    first = next(iter(cells.values())).cell.folder if cells else table.folder
    protocols = [read_json(first / name) for name in ("summary.json", "features.json")]
    return Results(
        title=table.title,
        command=command,
        commit=_commit(),
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        config=config,
        environment=_environment(),
        images=max((len(c.all) for c in cells.values()), default=0),
        steps=table.steps,
        notes=tuple(dict.fromkeys(notes)),
        study=study,
        objective=table.objective,
        protocol={k: str(v) for file in protocols for k, v in file.get("protocol", {}).items()},
        metrics=metrics,
        tasks={key: task.label for key, task in table.tasks.items()},
        methods=tuple(table.methods),
        cells=tuple(
            _cell(table, started, estimates[key], differences.get(key, {}), draws.get(key))
            for key, started in cells.items()
        ),
        measured={t: started[0].estimates(MEASURED) for t, started in by_task.items()},
        examples={t: _common(started)[: table.examples] for t, started in by_task.items()},
    )


def _metrics(cells: Cells, there: set[str]) -> tuple[Metric, ...]:
    """Return the metrics that there are; the name of a network belongs to theirs."""
    files = (read_json(started.cell.folder / "features.json") for started in cells.values())
    labels: dict[str, str] = next((file["labels"] for file in files if file), {})
    return tuple(replace(m, label=labels.get(m.key, m.label)) for m in METRICS if m.key in there)


def _cell(
    table: Table,
    started: StartedCell,
    metrics: dict[str, Estimate],
    differences: Differences,
    draws: Draws | None,
) -> reported.Cell:
    cell = started.cell
    return reported.Cell(
        *(cell.task, cell.method, cell.variant, cell.label),
        steps=cell.steps,
        images=len(started.all),
        metrics=metrics,
        passes=passes(started.all),
        seconds=started.seconds(),
        failed=started.failed,
        options={f"step_sizes.{k}": float(v) for k, v in cell.step_sizes.items()},
        folder=cell.folder.relative_to(table.folder).as_posix(),
        curves=started.curves,
        differences=differences,
        draws=draws,
    )


def _draws(table: Table, cell: Cell, summary: Mapping[str, Any]) -> Draws:
    from cmi_lightning.predict.restored import WHITE_STD

    def estimate(entry: Mapping[str, Any]) -> Estimate:
        return Estimate(entry["value"], entry["standard_error"])

    coverage = summary["coverage"]
    return Draws(
        images=summary["images"],
        draws=summary["draws"],
        coverage={percent: estimate(entry) for percent, entry in coverage.items()},
        expected={percent: entry["expected"] for percent, entry in coverage.items()},
        spread_skill=estimate(summary["spread_skill"]),
        residual=estimate(summary["residual"]),
        white=WHITE_STD,
        folder=cell.folder.relative_to(table.folder).as_posix(),
    )


def _common(cells: Sequence[StartedCell]) -> tuple[str, ...]:
    """Return the images that all cells have."""
    first, *others = (started.records for started in cells)
    return tuple(name for name in first if all(name in records for records in others))


def _notes_on_draws(posterior: Sequence[tuple[Cell, Mapping[str, Any]]]) -> Iterator[str]:
    for cell, summary in posterior:
        for note in summary["notes"]:
            of_one = bool(summary["failed"]) and "failed" in note
            yield f"{cell.task}, {cell.label}: {note}" if of_one else note


def _notes(
    table: Table, cells: Cells, differences: Mapping[Key, Differences], study: Study
) -> Iterator[str]:
    if not cells:
        yield "No cell has finished an image yet."
        return
    images = {key: len(started.all) for key, started in cells.items()}
    if short := [n for key, n in images.items() if n < cells[key].cell.images]:
        yield (
            f"The run is not finished (or there are no more images): {len(short)} of {len(cells)} "
            f"rows have fewer images than wanted, the shortest {min(short)}; with and without CMI "
            "they are the same."
        )
    wanted = [(t, m, variant) for t, m in table.rows() for variant in table.variants(m)]
    if missing := sum(key not in cells for key in wanted):
        yield f"Not started: {missing} of {counted(len(wanted), 'cell')}."
    for started in cells.values():
        if started.failed:
            name = f"{started.cell.task}, {started.cell.label}"
            yield f"{name}: {counted(started.failed, 'image')} failed; the means leave them out."
    run = dict.fromkeys((k[1], c.cell.steps) for k, c in cells.items() if k[2] != "equal")
    if told := [f"{method} {steps}" for method, steps in run if steps != table.steps]:
        yield f"These methods have other than {counted(table.steps, 'step')}: {', '.join(told)}."
    if table.cluster is not None:
        count = max(len(set(started.clusters.values())) for started in cells.values())
        yield (
            f"The images are of {count} clusters. Standard errors, intervals and tests take "
            "clusters as the independent units, not images."
        )
    if family := sum(key[2] == "cmi" and "base" in found for key, found in differences.items()):
        yield (
            f"{family} comparisons with the base are made of each metric. A difference is "
            f"significant after Holm's correction over all of its kind (family-wise "
            f"{100 * LEVEL:g} %), each metric and each kind of comparison for itself; the 95 % "
            "intervals are of one comparison each: of twenty without any effect, one leaves out "
            "zero."
        )
    equal = [n for key, n in images.items() if key[2] == "equal"]
    if equal and max(equal) < max(images.values()):
        yield (
            f"The rows of equal cost have the first {counted(max(equal), 'image')}: their means "
            f"cannot be set "
            "beside those of the other rows, above all distances of sets. Differences are over "
            "the images that both sides have."
        )
    if equal:
        yield (
            "The rows of equal cost have the step sizes that were chosen for "
            f"{counted(table.steps, 'step')}; nothing was searched for their longer runs."
        )
    for word in ADDED.values():
        every = [(name, s) for searches in study.values() for name, s in searches.items()]
        if searches := [s for name, s in every if name.startswith(f"{word}+")]:
            zero = sum(search.winner == 0 for search in searches)
            what = "CMI" if word == "CMI" else f"{word} of CMI"
            yield (
                f"In {zero} of {len(searches)} cells the search on validation images preferred no "
                f"{what} to every scale of it; the table shows the best scale other than zero."
            )


def _environment() -> dict[str, str]:
    software = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("cmi-lightning", "torch", "lightning", "torchmetrics", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            software[name] = version(name)
    return software | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    }


def _commit() -> str | None:
    """Return the commit of the checkout this package is in, if it is in one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None
