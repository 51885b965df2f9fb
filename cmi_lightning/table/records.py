"""The records that the runs of cells have left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmi_lightning.data.files import natural
from cmi_lightning.table.spec import Cell, Table


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's content; empty where it is absent, or a crash of the machine cut it short."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}


def records(folder: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's folder, in the order in which it restores its images."""
    root = folder / "records"
    names = {p: natural(p.relative_to(root).as_posix()) for p in root.rglob("*.json")}
    return [r for p in sorted(names, key=lambda p: names[p])[:limit] if (r := read_json(p))]


def measured(record: dict[str, Any]) -> dict[str, float]:
    """Return an image's metrics by name."""
    return {**record.get("metrics", {}), **record.get("perceptual", {})}


def passes(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the network passes per image: forwards and vector-Jacobian products."""
    counts = [record["forwards"] + record["vjps"] for record in records]
    return sum(counts) / len(counts) if counts else None


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
    return replace(cell, steps=max(cell.steps, round(cell.steps * cmi / base)))
