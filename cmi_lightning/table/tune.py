"""Choosing step sizes on validation images, the same number of trials for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from cmi_lightning.errors import InputError
from cmi_lightning.runs import write, write_json
from cmi_lightning.table.run import Done, Job, records, run
from cmi_lightning.table.spec import CMI, Cell, Table, Variant, safe

LOWER = ("perceptual", "lpips")  # objectives of which less is better


def trial(
    table: Table, task: str, method: str, size: float | None, cmi: float | None = None
) -> Cell:
    """Return the cell of a trial: a base with a step size, and CMI with one if it is given."""
    sizes, label = {}, safe(method)
    if (option := table.methods[method].option) is not None and size is not None:
        sizes[option], label = size, f"{label}@{size:g}"
    variant: Variant = "base"
    if table.cmi.option is not None and cmi is not None:
        sizes[table.cmi.option], label, variant = cmi, f"{CMI}@{cmi:g}+{label}", "cmi"
    folder = table.folder / "tune" / task / label
    return Cell(task, method, variant, sizes, table.steps, folder, validation=True)


def score(table: Table, cell: Cell) -> dict[str, float | int | None]:
    """Return mean, standard error and count of the objective over a trial's images."""
    values = []
    for record in records(cell.folder)[: table.tune_images]:
        parts = {**record.get("metrics", {}), **record.get("perceptual", {})}
        if table.objective not in parts:
            raise InputError(
                f"objective: the cells do not report '{table.objective}'; choose another, or add a "
                "callback that does to the configurations in `common`."
            )
        value = float(parts[table.objective])
        values.append(value if math.isfinite(value) and not record["failed"] else math.nan)
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < len(values) or not values:  # a step size that breaks an image is no choice
        return {"mean": None, "standard_error": None, "images": len(finite)}
    mean = math.fsum(values) / len(values)
    spread = math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return {
        "mean": mean,
        "standard_error": math.sqrt(spread / len(values)),
        "images": len(values),
    }


def best(table: Table, scores: dict[float, dict[str, Any]]) -> float | None:
    """Return the value with the best mean, the smallest of equals; None if all broke."""
    sign = -1 if table.objective in LOWER else 1
    finite = {v: s["mean"] for v, s in scores.items() if s["mean"] is not None}
    return max(sorted(finite), key=lambda v: sign * finite[v]) if finite else None


def tune(table: Table, tell: Callable[[Done], None]) -> dict[str, Any]:
    """Search every method's step size on every task, then CMI's on top of each.

    The study goes to ``tune/study.json`` in the output folder, and the winners as an overlay to
    ``step_sizes.yaml``. A trial is a run of ``cmi-lightning predict``: the search goes on where it
    was stopped.

    Of CMI, the best value other than zero is kept, because a table of zeros shows nothing; the
    study says where zero was better.

    Raises:
        InputError: if every value of a method breaks an image, or a cell cannot be run.
    """
    bases = [(t, m) for t, m in table.rows() if table.methods[m].option is not None]
    spaces = {m: table.methods[m].space for _, m in bases}
    run(table, _jobs(table, (trial(table, *row, v) for row in bases for v in spaces[row[1]])), tell)
    study: dict[str, dict[str, Any]] = {task: {} for task, _ in table.rows()}
    for task, method in bases:
        cells = {v: trial(table, task, method, v) for v in spaces[method]}
        study[task][method] = _summary(table, cells, f"{task}, {method}")
    _save(table, study)

    def cmi_trials(task: str, method: str) -> dict[float, Cell]:
        size = study[task].get(method, {}).get("chosen")
        # Without CMI it is the base, which has been run (but for one without a guidance).
        return {v: trial(table, task, method, size, v or None) for v in table.cmi.space}

    both = {row: cmi_trials(*row) for row in table.rows()}
    run(table, _jobs(table, (c for row in both.values() for c in row.values())), tell)
    for (task, method), trials in both.items():
        name = f"{CMI}+{method}"
        study[task][name] = _summary(table, trials, f"{task}, {name}", other_than_zero=True)
    _save(table, study)
    return study


def _jobs(table: Table, cells: Iterable[Cell]) -> list[Job]:
    unique = {cell.folder: cell for cell in cells}
    return [Job((cell,), table.tune_images) for cell in unique.values()]


def _summary(
    table: Table, cells: dict[float, Cell], name: str, other_than_zero: bool = False
) -> dict[str, Any]:
    scores = {value: score(table, cell) for value, cell in cells.items()}
    winner = best(table, scores)
    allowed = {v: s for v, s in scores.items() if v != 0 or not other_than_zero}
    chosen = best(table, allowed)
    if winner is None or chosen is None:
        raise InputError(f"{name}: every step size tried breaks an image; widen its space.")
    return {
        "trials": {f"{value:g}": s for value, s in scores.items()},
        "winner": winner,
        "chosen": chosen,
        "at_edge": len(cells) > 1 and chosen in (min(allowed), max(allowed)),
    }


def _save(table: Table, study: dict[str, Any]) -> None:
    import yaml

    found = {
        "objective": table.objective,
        "images": table.tune_images,
        "steps": table.steps,
        "seed": table.seed,
        "study": study,
    }
    write_json(table.folder / "tune" / "study.json", found)
    sizes = {task: {m: s["chosen"] for m, s in rows.items()} for task, rows in study.items()}
    text = yaml.safe_dump({"step_sizes": sizes}, allow_unicode=True, sort_keys=False)
    write(table.folder / "step_sizes.yaml", text.encode())
