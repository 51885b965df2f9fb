"""How the table came about: cells' options, the search for step sizes, what metrics measure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cmi_lightning.report.verdicts import Results, cell_label, in_order, mean_text, number, short
from cmi_lightning.table.spec import CMI


def options(known: Results) -> list[dict[str, Any]]:
    """Return the options of every cell."""
    return [
        {
            "task": known.task_label(task),
            "label": cell_label(cell),
            "options": ", ".join(f"{k} = {v}" for k, v in (cell.get("options") or {}).items()),
            "steps": short(cell.get("steps")),
            "images": short(cell.get("images")),
            "failed": short(cell.get("failed")),
        }
        for task in known.tasks
        for cell in known.cells(task)
    ]


def study(known: Results) -> list[dict[str, Any]]:
    """Return, by task, which step sizes were tried for each method, and what came of them."""
    found = []
    raw = {str(task): rows for task, rows in (known.raw.get("study") or {}).items()}
    for task in in_order(raw, known.tasks):
        rows = [_searched(known, str(name), entry) for name, entry in (raw[task] or {}).items()]
        columns = max((len(row["trials"]) for row in rows), default=0)
        if columns:
            found.append({"label": known.task_label(task), "rows": rows, "columns": columns})
    return found


def _searched(known: Results, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    plus, method = f"{CMI}+", name.removeprefix(f"{CMI}+")
    with_cmi = name.startswith(plus) and name not in known.methods
    trials = {float(v): s or {} for v, s in (entry.get("trials") or {}).items()}
    winner, chosen = number(entry.get("winner")), number(entry.get("chosen"))
    errors = [e for s in trials.values() if (e := number(s.get("standard_error")))]
    digits = max(2, min(4, 1 - math.floor(math.log10(min(errors))))) if errors else 2
    broken = [v for v, s in sorted(trials.items()) if number(s.get("mean")) is None]
    return {
        "label": known.variant_labels(method)["cmi"] if with_cmi else name,
        "trials": [
            {
                "value": _size(value),
                "text": "broke an image"
                if value in broken
                else mean_text({"mean": s.get("mean"), "se": s.get("standard_error")}, digits),
                "chosen": value == chosen,
            }
            for value, s in sorted(trials.items())
        ],
        "winner": _size(winner),
        "chosen": _size(chosen),
        "flags": [
            *(["at the edge of the values tried"] if entry.get("at_edge") else []),
            *(["zero was better"] if with_cmi and winner == 0 else []),
            *([f"broke an image at {', '.join(map(_size, broken))}"] if broken else []),
        ],
    }


def _size(value: float | None) -> str:
    """Return a step size as it is written in a configuration."""
    return "–" if value is None else f"{value:g}"


def study_images(known: Results) -> int | None:
    """Return on how many images every step size was tried, if on equally many."""
    counts = {
        score.get("images")
        for rows in (known.raw.get("study") or {}).values()
        for entry in (rows or {}).values()
        for score in (entry.get("trials") or {}).values()
        if score and number(score.get("mean")) is not None
    }
    return counts.pop() if len(counts) == 1 else None


def objective(known: Results) -> str:
    """Return how the metric is called by which step sizes were chosen, if it is known."""
    labels = {m["key"]: m["label"] for m in known.metrics}
    key = known.raw.get("objective") or ""
    return labels.get(key, key)


def definitions(known: Results) -> list[tuple[str, str]]:
    """Return how each metric is measured."""
    labels = {m["key"]: m["label"] for m in known.metrics}
    texts = known.raw.get("protocol") or {}
    return [(labels.get(key, key), text) for key, text in texts.items()]
