"""What the cells' records say together: means, paired differences, costs, images to look at."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cmi_lightning.table.cells import (
    MEASURED,
    OF_SETS,
    PER_IMAGE,
    RESTORED,
    CellResults,
    Key,
    gather,
)
from cmi_lightning.table.comparisons import compare
from cmi_lightning.table.examples import examples, extremes
from cmi_lightning.table.spec import CMI, Table, passes
from cmi_lightning.table.statistics import LEVEL, mean_and_error


def aggregate(table: Table, config: str = "", command: str = "") -> dict[str, Any]:
    """Return everything that the report and the tables show, as strict JSON holds it.

    Args:
        table: the table; what is not finished is left out.
        config: the configuration as YAML, to be shown.
        command: the command, to be shown.
    """
    cells = gather(table)
    metrics = _metrics(cells)
    sets = {key: _set_metrics(cell, metrics) for key, cell in cells.items()}
    comparisons = compare(table, cells, metrics)
    posterior, spread_notes = _posterior(table)
    study = _study(table)
    return {
        "title": table.title,
        "command": command,
        "commit": _commit(),
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "config": config,
        "environment": _environment(),
        "images": max((len(c.all) for c in cells.values()), default=0),
        "steps": table.steps,
        "notes": [*_notes(table, cells, comparisons, study), *spread_notes],
        "study": study,
        "objective": table.objective,
        "protocol": _protocol(cells),
        "metrics": [
            {"key": key, "label": label, "unit": unit, "better": better, "digits": digits}
            | {"per_image": key in PER_IMAGE}
            for key, (label, unit, better, digits) in metrics.items()
        ],
        "tasks": [{"key": k, "label": t.label} for k, t in table.tasks.items()],
        "methods": list(table.methods),
        "cells": [_cell(table, key, cell, metrics, sets[key]) for key, cell in cells.items()],
        "measured": _measured(cells, metrics),
        "comparisons": comparisons,
        "posterior": posterior,
        "examples": examples(table, cells),
        "extremes": extremes(table, cells, comparisons),
    }


def _metrics(cells: Mapping[Any, CellResults]) -> dict[str, tuple[str, str, str, int]]:
    """Return the metrics that some cell has."""
    found = {k: v for k, v in PER_IMAGE.items() if any(c.values(k) for c in cells.values())}
    if any(c.fid() is not None for c in cells.values()):
        found["fid"] = OF_SETS["fid"]
    if any(c.embeddings(list(c.records)[:1]) for c in cells.values() if c.records):
        found |= {k: OF_SETS[k] for k in ("frechet", "kernel")}
    for results in cells.values():  # the network's name belongs to the metrics'
        path = results.cell.folder / "features.json"
        if path.is_file():
            for key, label in json.loads(path.read_text(encoding="utf-8"))["labels"].items():
                if key in found:
                    found[key] = (label, *found[key][1:])
            break
    return found


def _set_metrics(
    cell: CellResults, metrics: Mapping[str, Any], of: int = RESTORED
) -> dict[str, float | None]:
    """Return the metrics that are of a cell's images together."""
    from cmi_lightning.callbacks.distances import frechet, kernel

    found: dict[str, float | None] = {}
    if "fid" in metrics and of == RESTORED:
        found["fid"] = cell.fid()
    if "frechet" in metrics and len(cell.records) > 1:
        both = cell.embeddings(list(cell.records), of)
        if both is not None:
            found |= {"frechet": frechet(*both), "kernel": kernel(*both)}
    return found


def _cell(
    table: Table,
    key: Key,
    results: CellResults,
    metrics: Mapping[str, Any],
    sets: Mapping[str, float | None],
) -> dict[str, Any]:
    task, method, variant = key
    values: dict[str, dict[str, float | None]] = {}
    for metric in metrics:
        if metric in PER_IMAGE and (per_image := results.values(metric)):
            values[metric] = mean_and_error(list(per_image.values()))
        elif sets.get(metric) is not None:
            values[metric] = {"mean": sets[metric], "se": None}
    return {
        "task": task,
        "method": method,
        "variant": variant,
        "label": results.cell.label,
        "steps": results.cell.steps,
        "images": len(results.all),
        "failed": results.failed,
        "options": {f"step_sizes.{k}": v for k, v in results.cell.step_sizes.items()},
        "metrics": values,
        "passes": passes(results.all),
        "seconds": results.seconds(),
        "folder": results.cell.folder.relative_to(table.folder).as_posix(),
        "curves": results.curves,
    }


def _measured(cells: Mapping[Key, CellResults], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of A⁺y, from the first cell of each task."""
    found: dict[str, Any] = {}
    for (task, _, _), results in cells.items():
        if task not in found:
            columns = {m: list(results.values(m, "_measurement").values()) for m in PER_IMAGE}
            values = {m: mean_and_error(v) for m, v in columns.items() if v}
            sets = _set_metrics(results, metrics, MEASURED)
            found[task] = {
                "metrics": values | {m: {"mean": v, "se": None} for m, v in sets.items()}
            }
    return found


def _posterior(table: Table) -> tuple[list[dict[str, Any]], list[str]]:
    found, notes = [], []
    for cell in table.posterior_cells():
        path = cell.folder / "posterior.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        name = f"{cell.task}, {cell.label}"
        for note in summary["notes"]:
            of_one = bool(summary["failed"]) and "failed" in note
            notes.append(f"{name}: {note}" if of_one else note)
        found.append(
            {
                "task": cell.task,
                "method": cell.method,
                "variant": cell.variant,
                "label": cell.label,
                "images": summary["images"],
                "draws": summary["draws"],
                "coverage": {p: c["value"] for p, c in summary["coverage"].items()},
                "expected": {p: c["expected"] for p, c in summary["coverage"].items()},
                "spread_skill": summary["spread_skill"]["value"],
                "residual": summary["residual"]["value"],
                "errors": {
                    "50": summary["coverage"]["50"]["standard_error"],
                    "90": summary["coverage"]["90"]["standard_error"],
                    "spread_skill": summary["spread_skill"]["standard_error"],
                    "residual": summary["residual"]["standard_error"],
                },
                "folder": cell.folder.relative_to(table.folder).as_posix(),
            }
        )
    return found, list(dict.fromkeys(notes))


def _notes(
    table: Table,
    cells: Mapping[Key, CellResults],
    comparisons: Sequence[Mapping[str, Any]],
    study: Mapping[str, Any],
) -> list[str]:
    notes = []
    if not cells:
        return ["No cell has finished an image yet."]
    short = [
        len(results.all)
        for (_, _, variant), results in cells.items()
        if len(results.all) < table.limit(variant, table.images)
    ]
    if short:
        notes.append(
            f"The run is not finished (or there are no more images): {len(short)} of {len(cells)} "
            f"rows have fewer images than wanted, the shortest {min(short)}; with and without CMI "
            "they are the same."
        )
    wanted = [(t, m, variant) for t, m in table.rows() for variant in table.variants(m)]
    if missing := sum(key not in cells for key in wanted):
        notes.append(f"{missing} of {len(wanted)} cells have not been started.")
    for results in cells.values():
        if results.failed:
            notes.append(
                f"{results.cell.task}, {results.cell.label}: {results.failed} images failed and "
                "are left out."
            )
    family = sum((c["variant"], c["against"]) == ("cmi", "base") for c in comparisons)
    if family:
        notes.append(
            f"{family} comparisons with the base are made of each metric. A difference is "
            f"significant after Holm's correction over all of its kind (family-wise "
            f"{100 * LEVEL:g} %), each metric and each kind of comparison for itself; the 95 % "
            "intervals are of one comparison each: of twenty without any effect, one leaves out "
            "zero."
        )
    if any(key[2] == "equal" for key in cells):
        most = max(len(c.all) for key, c in cells.items() if key[2] == "equal")
        if most < max(len(c.all) for c in cells.values()):
            notes.append(
                f"The rows of equal cost have the first {most} images: their means cannot be set "
                "beside those of the other rows, above all distances of sets. Differences are over "
                "the images that both sides have."
            )
        notes.append(
            "The rows of equal cost have the step sizes that were chosen for "
            f"{table.steps} steps; nothing was searched for their longer runs."
        )
    rows = [s for task in study.values() for name, s in task.items() if name.startswith(CMI)]
    if rows:
        zero = sum(s["winner"] == 0 for s in rows)
        notes.append(
            f"In {zero} of {len(rows)} cells the search on validation images preferred no CMI to "
            "every scale of it; the table shows the best scale other than zero."
        )
    return notes


def _study(table: Table) -> dict[str, Any]:
    """Return what ``tune`` tried for the table's rows and chose, where the table uses it."""
    try:
        text = (table.folder / "tune" / "study.json").read_text(encoding="utf-8")
        found = json.loads(text)["study"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    return {
        task: {
            name: entry
            for name, entry in found.get(task, {}).items()
            if table.step_sizes.get(task, {}).get(name) == entry["chosen"]
        }
        for task in dict.fromkeys(task for task, _ in table.rows())
    }


def _protocol(cells: Mapping[Any, CellResults]) -> dict[str, str]:
    """Return how the metrics were computed, as the first cell's run says."""
    found: dict[str, str] = {}
    for results in cells.values():
        for file in ("summary.json", "features.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                text = (results.cell.folder / file).read_text(encoding="utf-8")
                protocol = json.loads(text).get("protocol", {})
                found |= {key: str(value) for key, value in protocol.items()}
        break
    return found


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("cmi-lightning", "torch", "lightning", "torchmetrics", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**found, "device": device}


def _commit() -> str | None:
    """Return the commit of the checkout this package is in, if it is in one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
