"""Choosing step sizes on validation images, the same number of trials for every method."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from cmi_lightning.errors import InputError
from cmi_lightning.files import write, write_json
from cmi_lightning.report.results import CMI, Search, Trial, Variant, typed
from cmi_lightning.statistics import mean_and_error
from cmi_lightning.table.progress import ProgressPrinter
from cmi_lightning.table.run import LOG, Job, records, run
from cmi_lightning.table.spec import Cell, Table, safe

Study = dict[str, dict[str, Search]]  # by task, then "DPS" or "CMI+DPS"
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


def score(table: Table, cell: Cell) -> Trial:
    """Return the objective's mean over a trial's images; None where one of them broke.

    Raises:
        InputError: if the cells do not report the objective.
    """
    values = []
    tried = records(cell.folder, table.tune_images)
    for record in tried:
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
    estimate = mean_and_error(values if len(values) == len(tried) else [])
    return Trial(estimate.mean, estimate.se, len(values))


def best(table: Table, means: Mapping[float, float | None]) -> float | None:
    """Return the value with the best mean, of equals the nearest to 0; None if all broke."""
    sign = -1 if table.objective in LOWER else 1
    finite = {value: mean for value, mean in means.items() if mean is not None}
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


def tune(table: Table, printer: ProgressPrinter) -> Study:
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
    printer.expect([first, *rest])
    run(table, [first], printer)
    score(table, first.cells[0])  # one trial tells whether the objective is there
    _check_images(table, first.cells[0])
    run(table, rest, printer)
    study: Study = {task: {} for task, _ in table.rows()}
    for task, method in bases:
        cells = {v: trial(table, task, method, v) for v in spaces[method]}
        study[task][method] = _search(table, cells)
    _save(table, study)

    def cmi_trials(task: str, method: str) -> dict[float, Cell]:
        size = study[task][method].chosen if method in study[task] else None
        # Without CMI it is the base, which has been run (but for one without a guidance).
        return {v: trial(table, task, method, size, v or None) for v in table.cmi.space}

    broken = [f"{t}, {m}" for t, m in bases if study[t][m].chosen is None]
    rows = [(t, m) for t, m in table.rows() if f"{t}, {m}" not in broken]
    both = {row: cmi_trials(*row) for row in rows}
    jobs = _jobs(table, (c for row in both.values() for c in row.values()))
    printer.expect(jobs)
    run(table, jobs, printer)
    for (task, method), trials in both.items():
        name = f"{CMI}+{method}"
        study[task][name] = _search(table, trials, other_than_zero=True)
        if study[task][name].chosen is None:
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


def _search(table: Table, cells: dict[float, Cell], other_than_zero: bool = False) -> Search:
    trials = {value: score(table, cell) for value, cell in cells.items()}
    means = {value: trial.mean for value, trial in trials.items()}
    allowed = {v: mean for v, mean in means.items() if v != 0 or not other_than_zero}
    chosen = best(table, allowed)
    at_edge = len(allowed) > 1 and chosen in (min(allowed), max(allowed))
    by_name = {f"{value:g}": trial for value, trial in trials.items()}
    return Search(by_name, best(table, means), chosen, at_edge)


def read_study(table: Table, setting: Mapping[str, Any] | None = None) -> Study:
    """Return what earlier searches found, with the given setting; empty where there is none."""
    path = table.folder / "tune" / "study.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if (setting or {}).items() <= content.items():
            study: Study = typed(Study, content["study"])
            return study
    return {}


def _save(table: Table, study: Study) -> None:
    """Write the study and its overlay; what an earlier search found of other tasks is kept."""
    import yaml

    setting = {
        "objective": table.objective,
        "images": table.tune_images,
        "steps": table.steps,
        "seed": table.seed,
    }
    kept = read_study(table, setting)
    for task, searches in study.items():  # what was found on top of another step size is void
        for name, search in searches.items():
            if kept.get(task, {}).get(name, search).chosen != search.chosen:
                kept[task].pop(f"{CMI}+{name}", None)
    merged = {task: {**kept.get(task, {}), **study.get(task, {})} for task in {**kept, **study}}
    content = {
        task: {name: asdict(search) for name, search in rows.items()}
        for task, rows in merged.items()
    }
    write_json(table.folder / "tune" / "study.json", {**setting, "study": content})
    sizes = {
        task: {name: s.chosen for name, s in rows.items() if s.chosen is not None}
        for task, rows in merged.items()
    }
    text = yaml.safe_dump({"step_sizes": sizes}, allow_unicode=True, sort_keys=False)
    write(table.folder / "step_sizes.yaml", text.encode())
