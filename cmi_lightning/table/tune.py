"""Choosing step sizes on validation images, the same number of trials for every method."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from cmi_lightning.errors import InputError
from cmi_lightning.files import write, write_json
from cmi_lightning.table.run import LOG, Done, Job, records, run
from cmi_lightning.table.spec import CMI, Cell, Table, Variant, safe
from cmi_lightning.table.statistics import mean_and_error

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
    """Return mean, standard error and count of the objective over a trial's images.

    Raises:
        InputError: if the cells do not report the objective.
    """
    values = []
    found = records(cell.folder, table.tune_images)
    for record in found:
        parts = {**record.get("metrics", {}), **record.get("perceptual", {})}
        if record["failed"]:
            continue
        if table.objective not in parts:
            raise InputError(
                f"objective: the cells do not report '{table.objective}'; choose another, or see "
                f"'{cell.folder / LOG}' for what it lacks."
            )
        values.append(float(parts[table.objective]))
    values = [v for v in values if math.isfinite(v)]
    whole = len(values) == len(found) > 0
    mean = mean_and_error(values) if whole else {"mean": None, "se": None}
    return {"mean": mean["mean"], "standard_error": mean["se"], "images": len(values)}


def best(table: Table, scores: dict[float, dict[str, Any]]) -> float | None:
    """Return the value with the best mean, of equals the nearest to 0; None if all broke."""
    sign = -1 if table.objective in LOWER else 1
    finite = {v: s["mean"] for v, s in scores.items() if s["mean"] is not None}
    return max(sorted(finite, key=abs), key=lambda v: sign * finite[v]) if finite else None


def check(table: Table) -> None:
    """Check that a table can be tuned.

    Raises:
        InputError: if no other images than the reported ones are named, or methods would get
            unequal trials.
    """
    if not table.validation:
        raise InputError(
            "validation: name a configuration that selects other images than those that the table "
            "reports."
        )
    spaces = {m: table.methods[m].space for _, m in table.rows() if table.methods[m].option}
    spaces[CMI] = table.cmi.space
    if table.cmi.option is None:
        raise InputError("cmi.option: name the step size that its configurations read.")
    for name, space in spaces.items():
        if len({f"{v:g}" for v in space}) < len(space) or len(space) != len(table.cmi.space):
            raise InputError(
                f"The space of {name} has {len(space)} values, and that of {CMI} "
                f"{len(table.cmi.space)}: every method gets the same number of different ones."
            )
    if 0 not in table.cmi.space or len(table.cmi.space) < 2:
        raise InputError("cmi.space: give 0, which is no CMI, and at least one other value.")


def tune(table: Table, tell: Callable[[Done], None]) -> dict[str, Any]:
    """Search every method's step size on every task, then CMI's on top of each.

    The study goes to ``tune/study.json`` in the output folder, and the winners as an overlay to
    ``step_sizes.yaml``. A trial is a run of ``cmi-lightning predict``: the search goes on where it
    was stopped. A value that breaks an image is no choice.

    Of CMI, the best value other than zero is kept, because a table of zeros shows nothing; the
    study says where zero was better.

    Raises:
        InputError: if the table cannot be tuned or a cell cannot be run; and at the end, if every
            value of some methods breaks an image.
    """
    check(table)
    bases = [(t, m) for t, m in table.rows() if table.methods[m].option is not None]
    spaces = {m: table.methods[m].space for _, m in bases}
    first, *rest = _jobs(table, (trial(table, *row, v) for row in bases for v in spaces[row[1]]))
    run(table, [first], tell)
    score(table, first.cells[0])  # one trial tells whether the objective is there
    _check_images(table, first.cells[0])
    run(table, rest, tell)
    study: dict[str, dict[str, Any]] = {task: {} for task, _ in table.rows()}
    for task, method in bases:
        cells = {v: trial(table, task, method, v) for v in spaces[method]}
        study[task][method] = _summary(table, cells)
    _save(table, study)

    def cmi_trials(task: str, method: str) -> dict[float, Cell]:
        size = study[task].get(method, {}).get("chosen")
        # Without CMI it is the base, which has been run (but for one without a guidance).
        return {v: trial(table, task, method, size, v or None) for v in table.cmi.space}

    broken = [f"{t}, {m}" for t, m in bases if study[t][m]["chosen"] is None]
    rows = [(t, m) for t, m in table.rows() if f"{t}, {m}" not in broken]
    both = {row: cmi_trials(*row) for row in rows}
    run(table, _jobs(table, (c for row in both.values() for c in row.values())), tell)
    for (task, method), trials in both.items():
        name = f"{CMI}+{method}"
        study[task][name] = _summary(table, trials, other_than_zero=True)
        if study[task][name]["chosen"] is None:
            broken.append(f"{task}, {name}")
    _save(table, study)
    if broken:
        raise InputError(f"Every value tried breaks an image: {'; '.join(broken)}; widen `space`.")
    return study


def _check_images(table: Table, cell: Cell) -> None:
    """Refuse validation images that the table reports."""
    tried = {record["input"] for record in records(cell.folder)}
    for task, method in table.rows():
        if any(r["input"] in tried for r in records(table.cell(task, method).folder)):
            raise InputError("validation: it selects images that the table reports.")


def _jobs(table: Table, cells: Iterable[Cell]) -> list[Job]:
    unique = {cell.folder: cell for cell in cells}
    return [Job((cell,), table.tune_images) for cell in unique.values()]


def _summary(
    table: Table, cells: dict[float, Cell], other_than_zero: bool = False
) -> dict[str, Any]:
    scores = {value: score(table, cell) for value, cell in cells.items()}
    allowed = {v: s for v, s in scores.items() if v != 0 or not other_than_zero}
    chosen = best(table, allowed)
    return {
        "trials": {f"{value:g}": s for value, s in scores.items()},
        "winner": best(table, scores),
        "chosen": chosen,
        "at_edge": len(allowed) > 1 and chosen in (min(allowed), max(allowed)),
    }


def _save(table: Table, study: dict[str, Any]) -> None:
    """Write the study and its overlay; what an earlier search found of other tasks is kept."""
    import yaml

    path = table.folder / "tune" / "study.json"
    setting = {
        "objective": table.objective,
        "images": table.tune_images,
        "steps": table.steps,
        "seed": table.seed,
    }
    before: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))
    kept = before["study"] if setting.items() <= before.items() else {}
    for task, rows in study.items():  # what was found on top of another step size is void
        for name, entry in rows.items():
            if kept.get(task, {}).get(name, entry)["chosen"] != entry["chosen"]:
                kept[task].pop(f"{CMI}+{name}", None)
    merged = {task: {**kept.get(task, {}), **study.get(task, {})} for task in {**kept, **study}}
    write_json(path, {**setting, "study": merged})
    sizes = {
        task: {m: s["chosen"] for m, s in rows.items() if s["chosen"] is not None}
        for task, rows in merged.items()
    }
    text = yaml.safe_dump({"step_sizes": sizes}, allow_unicode=True, sort_keys=False)
    write(table.folder / "step_sizes.yaml", text.encode())
