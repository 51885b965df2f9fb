"""Choosing step sizes on validation images, the same number of trials for every method."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from cmi_lightning.errors import InputError
from cmi_lightning.files import write, write_json
from cmi_lightning.report.results import ADDED, CMI, Search, Trial, Variant, typed
from cmi_lightning.statistics import mean_and_error
from cmi_lightning.table.cells import METRICS
from cmi_lightning.table.records import Cell, measured, read_json, records, safe
from cmi_lightning.table.run import LOG, ProgressPrinter, run
from cmi_lightning.table.spec import Table

Study = dict[str, dict[str, Search]]  # by task, then "DPS" or "CMI+DPS"
Trials = Mapping[tuple[str, str], dict[float, Cell]]  # by task and name, then by step size


def trial(
    table: Table,
    task: str,
    method: str,
    size: float | None,
    added: float | None = None,
    variant: Variant = "cmi",
) -> Cell:
    """Return the cell of a trial: a base with a step size, and what a variant adds with one."""
    sizes, label = {}, safe(method)
    if (option := table.methods[method].option) is not None and size is not None:
        sizes[option], label = size, f"{label}@{size:g}"
    guidance = table.added(variant)
    if added is None or guidance is None or guidance.option is None:
        variant = "base"
    else:
        sizes[guidance.option], label = added, f"{ADDED[variant]}@{added:g}+{label}"
    folder = table.folder / "tune" / task / label
    steps, images = table.steps_of(method), table.tune_images
    return Cell(task, method, variant, sizes, steps, images, folder, validation=True)


def score(table: Table, cell: Cell) -> Trial:
    """Return the objective's mean over a trial's images; None where one of them broke.

    Raises:
        InputError: if the cells do not report the objective.
    """
    tried = records(cell.folder, cell.images)
    scores = [measured(r).get(table.objective) for r in tried if not r["failed"]]
    if None in scores:
        raise InputError(
            f"objective: the cells do not report '{table.objective}'; choose another, or see "
            f"'{cell.folder / LOG}' for what it lacks."
        )
    values = [float(v) for v in scores if v is not None and math.isfinite(float(v))]
    estimate = mean_and_error(values if len(values) == len(tried) else [])
    return Trial(estimate.mean, estimate.se, len(values))


def best(table: Table, means: Mapping[float, float | None]) -> float | None:
    """Return the value with the best mean, of equals the nearest to 0; None if all broke."""
    sign = next(metric.sign for metric in METRICS if metric.key == table.objective)
    finite = {value: mean for value, mean in means.items() if mean is not None}
    return max(sorted(finite, key=abs), key=lambda v: sign * finite[v]) if finite else None


def searches(table: Table) -> dict[Variant, list[tuple[str, str, list[float]]]]:
    """Return what is searched, by variant: tasks, methods, and the step sizes that are tried.

    CMI is searched on top of every base, and its descent where the table has a step size for it.
    """
    found: dict[Variant, list[tuple[str, str, list[float]]]] = {
        "base": [(t, m, table.methods[m].space) for t, m in table.rows() if table.methods[m].option]
    }
    with_cmi = [(task, method) for task, method in table.rows() if table.methods[method].cmi]
    for variant in ADDED:
        guidance = table.added(variant)
        if guidance is not None and (guidance.option or variant == "cmi"):
            found[variant] = [(task, method, guidance.space) for task, method in with_cmi]
    return found


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
    wanted = searches(table)
    spaces = {method: space for _, method, space in wanted.pop("base")}
    for variant in wanted:
        guidance = table.added(variant) or table.cmi
        if guidance.option is None:
            raise InputError(f"{variant}.option: name the step size that its configurations read.")
        if 0 not in guidance.space or len(guidance.space) < 2:
            raise InputError(
                f"{variant}.space: give 0, which is no CMI, and at least one other value."
            )
        if variant == "descent" and max(guidance.space) > 0:
            raise InputError("descent.space: give 0 and values below it; those above are CMI's.")
        spaces[ADDED[variant]] = guidance.space
    for name, space in spaces.items():
        if len({f"{v:g}" for v in space}) < len(space) or len(space) != len(table.cmi.space):
            raise InputError(
                f"The space of {name} has {len(space)} values, and that of {CMI} "
                f"{len(table.cmi.space)}: every method gets the same number of different ones."
            )


def probes(table: Table) -> list[Cell]:
    """Return a trial of every search, by which its configurations can be checked."""
    return [
        trial(table, task, method, 1.0, None if variant == "base" else 1.0, variant)
        for variant, rows in searches(table).items()
        for task, method, _ in rows
    ]


def count_trials(table: Table) -> int:
    """Return how many runs a search takes."""
    return sum(len(space) for rows in searches(table).values() for *_, space in rows)


def tune(table: Table, printer: ProgressPrinter) -> Study:
    """Search every method's step size on every task, then CMI's on top of each, then descent's.

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
    study: Study = {task: {} for task, _ in table.rows()}
    for variant, rows in searches(table).items():
        trials = {}
        for task, method, space in rows:
            base = study[task].get(method)
            if variant == "base":
                trials[task, method] = {v: trial(table, task, method, v) for v in space}
            elif base is None or base.chosen is not None:  # not of a base that breaks an image
                size = base.chosen if base else None
                # At zero it is the base, which has been run (but for one without a guidance).
                trials[task, f"{ADDED[variant]}+{method}"] = {
                    v: trial(table, task, method, size, v or None, variant) for v in space
                }
        _try(table, trials, study, printer, other_than_zero=variant != "base")
    every = [(f"{t}, {name}", s) for t, of_task in study.items() for name, s in of_task.items()]
    if names := [name for name, search in every if search.chosen is None]:
        raise InputError(f"Every value tried breaks an image: {'; '.join(names)}; widen `space`.")
    return study


def _try(
    table: Table, trials: Trials, study: Study, printer: ProgressPrinter, other_than_zero: bool
) -> None:
    """Run trials, and add to the study what they say."""
    unique = {cell.folder: cell for cells in trials.values() for cell in cells.values()}
    jobs = [(cell,) for cell in unique.values()]
    printer.expect(jobs)
    run(table, jobs[:1], printer)
    for (cell,) in jobs[:1]:  # one trial tells whether the objective is there
        score(table, cell)
        _check_images(table, cell)
    run(table, jobs[1:], printer)
    for (task, name), cells in trials.items():
        study[task][name] = _search(table, cells, other_than_zero)
    _save(table, study)


def _check_images(table: Table, cell: Cell) -> None:
    """Refuse validation images that the table reports."""
    tried = {record["input"] for record in records(cell.folder)}
    for task, method in table.rows():
        if any(r["input"] in tried for r in records(table.cell(task, method).folder)):
            raise InputError("validation: it selects images that the table reports.")


def _search(table: Table, cells: dict[float, Cell], other_than_zero: bool) -> Search:
    trials = {value: score(table, cell) for value, cell in cells.items()}
    means = {value: trial.mean for value, trial in trials.items()}
    allowed = {v: mean for v, mean in means.items() if v != 0 or not other_than_zero}
    chosen = best(table, allowed)
    at_edge = len(allowed) > 1 and chosen in (min(allowed), max(allowed))
    by_name = {f"{value:g}": trial for value, trial in trials.items()}
    return Search(by_name, best(table, means), chosen, at_edge)


def read_study(table: Table, setting: Mapping[str, Any] | None = None) -> Study:
    """Return what earlier searches found, with the given setting; empty where there is none."""
    content = read_json(table.folder / "tune" / "study.json")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        if (setting or {}).items() <= content.items():
            study: Study = typed(Study, content["study"])
            return study
    return {}


def read_searches(table: Table) -> Iterator[tuple[str, str, Search, bool]]:
    """Yield what was found for a table's tasks: task, name, search, whether the table uses it."""
    study = read_study(table)
    for task in dict.fromkeys(task for task, _ in table.rows()):
        for name, search in study.get(task, {}).items():
            yield task, name, search, table.step_sizes.get(task, {}).get(name) == search.chosen


def _save(table: Table, study: Study) -> None:
    """Write the study and its overlay; what an earlier search found of other tasks is kept."""
    import yaml

    setting = {"objective": table.objective, "images": table.tune_images}
    setting |= {"steps": table.steps, "seed": table.seed}
    kept = read_study(table, setting)
    for task, searches in study.items():  # what was found on top of another step size is void
        for name, search in searches.items():
            if kept.get(task, {}).get(name, search).chosen != search.chosen:
                for word in ADDED.values():
                    kept[task].pop(f"{word}+{name}", None)
    merged = {task: {**kept.get(task, {}), **study.get(task, {})} for task in {**kept, **study}}
    content = {t: {name: asdict(s) for name, s in rows.items()} for t, rows in merged.items()}
    write_json(table.folder / "tune" / "study.json", {**setting, "study": content})
    sizes = {
        task: {name: s.chosen for name, s in rows.items() if s.chosen is not None}
        for task, rows in merged.items()
    }
    text = yaml.safe_dump({"step_sizes": sizes}, allow_unicode=True, sort_keys=False)
    write(table.folder / "step_sizes.yaml", text.encode())
