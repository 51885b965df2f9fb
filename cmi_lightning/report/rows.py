"""The rows of the report's table: a cell's means, each with the verdicts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmi_lightning.report.tables import MEASURED
from cmi_lightning.report.verdicts import (
    AGAINST,
    Results,
    cell_label,
    mean_text,
    number,
    other_images,
    short,
)


def by_task(known: Results) -> list[dict[str, Any]]:
    """Return the table's rows by task."""
    found = []
    for task in known.tasks:
        measured = (known.raw.get("measured") or {}).get(task) or {}
        rows = [_row(known, cell) for cell in known.cells(task)]
        if metrics := measured.get("metrics"):
            plain = {"task": task, "method": "", "variant": "measured", "label": MEASURED}
            rows.insert(0, _row(known, plain | {"metrics": metrics, "passes": 0}))
        if rows:
            found.append({"label": known.task_label(task), "rows": rows})
    return found


def any_fewer_pairs(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any row tells a number of pairs."""
    entries = [entry for group in groups for row in group["rows"] for entry in row["entries"]]
    return any(v["pairs"] is not None for entry in entries for v in entry["verdicts"].values())


def _row(known: Results, cell: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": cell_label(cell),
        "variant": cell["variant"],
        "failed": cell.get("failed") or 0,
        "images": other_images(known.raw, cell),
        "entries": [_entry(known, cell, metric) for metric in known.metrics],
        "passes": {"text": short(cell.get("passes")), "value": number(cell.get("passes"))},
        "seconds": {"text": short(cell.get("seconds")), "value": number(cell.get("seconds"))},
    }


def _entry(known: Results, cell: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's mean of one metric, and how it compares with each of the others."""
    entry = (cell.get("metrics") or {}).get(metric["key"])
    verdicts = {}
    for against in AGAINST:
        verdict = known.verdict(cell["task"], cell["method"], metric, cell["variant"], against)
        if verdict and verdict.direction != "none":
            verdicts[against] = {
                "name": verdict.name if cell["variant"] == "cmi" else "none",
                "symbol": verdict.symbol,
                "words": verdict.words,
                "text": verdict.text(metric["digits"]).partition(" ")[::2],
                "p": _p(verdict.p),
                "pairs": verdict.fewer(cell),
            }
    return {
        "text": mean_text(entry, metric["digits"]),
        "value": number((entry or {}).get("mean")),
        "verdicts": verdicts,
    }


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
