"""The table's rows, and the table as Markdown, long CSV and LaTeX."""

from __future__ import annotations

import csv as csv_module
import io
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmi_lightning.files import write
from cmi_lightning.report.results import ADDED, AGAINST, Cell, Metric, Results, Task
from cmi_lightning.report.verdicts import Verdict, mean_text, short, verdict
from cmi_lightning.statistics import Estimate

MEASURED = "measurement A⁺y"
DIFFERENCE = ("difference", "low", "high", "p", "significant", "improved", "pairs")
OF_CELL = ("images", "failed", "steps", "passes", "seconds")
COLUMNS = (
    *("task", "method", "variant", "label", "metric", "unit", "better", "mean", "se"),
    *(*OF_CELL, *(f"{name}_{against}" for against in AGAINST for name in DIFFERENCE)),
)
COLOURS = {
    "better": "A6DBAE",
    "better-unsure": "E6F4E8",
    "worse": "F2B3AC",
    "worse-unsure": "FBE9E7",
}
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    **{c: f"\\{c}" for c in "#$%&_"},
    **{c: f"\\ensuremath{{\\{name}}}" for c, name in {
        "Π": "Pi", "Σ": "Sigma", "Δ": "Delta", "α": "alpha", "β": "beta", "σ": "sigma",
        "η": "eta", "ζ": "zeta", "κ": "kappa", "λ": "lambda", "×": "times", "±": "pm",
        "↑": "uparrow", "↓": "downarrow", "≤": "leq", "≥": "geq",
    }.items()},
    "−": r"\ensuremath{-}",
    "⁺": r"\ensuremath{^{+}}",
    "²": r"\ensuremath{^{2}}",
    "₀": r"\ensuremath{_{0}}",
}  # fmt: skip
SYMBOLS = {
    "▲": r"\blacktriangle",
    "▼": r"\blacktriangledown",
    "△": r"\vartriangle",
    "▽": r"\triangledown",
    "=": "=",
    "−": "-",
    "±": r"\pm",
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~&!$])")


@dataclass(frozen=True)
class Entry:
    """A row's mean of a metric, with the verdicts on it by what it is compared with."""

    metric: Metric
    estimate: Estimate | None
    verdicts: Mapping[str, Verdict]

    @property
    def text(self) -> str:
        """The mean and its error."""
        return mean_text(self.estimate, self.metric.digits)


@dataclass(frozen=True)
class Row:
    """A cell, or a task's measurements; ``images`` is told where other cells have more."""

    task: Task
    label: str
    variant: str
    cell: Cell | None
    images: int | None
    entries: list[Entry]

    @property
    def name(self) -> str:
        """The label, with the number of images where that is its own."""
        return self.label if self.images is None else f"{self.label}, {self.images} images"

    @property
    def added(self) -> bool:
        """Whether the cell has CMI, so that its differences are verdicts on it."""
        return self.variant in ADDED

    @property
    def passes(self) -> float | None:
        """Network passes per image; a measurement needs none."""
        return self.cell.passes if self.cell else 0.0

    @property
    def seconds(self) -> float | None:
        """Seconds per image."""
        return self.cell.seconds if self.cell else None


def rows(results: Results) -> dict[Task, list[Row]]:
    """Return the table's rows, by task."""
    every: dict[Task, list[Row]] = defaultdict(list)
    for task in results.tasks:
        if measured := results.measured.get(task.key):
            entries = [Entry(metric, measured.get(metric.key), {}) for metric in results.metrics]
            every[task].append(Row(task, MEASURED, "measured", None, None, entries))
        for cell in results.cells_of(task.key):
            images = None if cell.images == results.images else cell.images
            entries = [
                Entry(
                    metric,
                    cell.metrics.get(metric.key),
                    {a: v for a in AGAINST if (v := verdict(results, metric, cell, a))},
                )
                for metric in results.metrics
            ]
            every[task].append(Row(task, cell.label, cell.variant, cell, images, entries))
    return every


def write_tables(results: Results, folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.tex``."""
    for name, text in (("md", markdown), ("csv", csv), ("tex", latex)):
        write(folder / f"table.{name}", text(results).encode("utf-8", "replace"))


def markdown(results: Results) -> str:
    """Return the table as Markdown: a row per cell, with CMI's paired differences beside."""
    return _render("table.md.j2", results)


def latex(results: Results) -> str:
    r"""Return a ``tabular`` with booktabs' rules; CMI's cells in green or red, and a triangle.

    Needs the packages booktabs, amssymb and xcolor (with the option ``table``).
    """
    return _render("table.tex.j2", results)


def _render(name: str, results: Results) -> str:
    template = _environment().get_template(name)
    return template.render(results=results, groups=rows(results), colours=COLOURS, short=short)


@cache
def _environment() -> Environment:
    environment = Environment(  # braces are LaTeX's
        *("<%", "%>", "<<", ">>", "<#", "#>"),
        loader=PackageLoader("cmi_lightning.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["line"] = lambda text: " ".join(text.split())
    environment.filters["md"] = lambda text: MARKDOWN.sub(r"\\\1", " ".join(text.split()))
    environment.filters["tex"] = lambda text: "".join(
        LATEX.get(c, c) for c in " ".join(text.split())
    )
    environment.filters["math"] = lambda text: (
        "--" if text == "–" else f"${''.join(SYMBOLS.get(c, c) for c in text)}$"
    )
    return environment


def csv(results: Results) -> str:
    """Return a row per cell and metric, numbers in full; ``…_base`` are differences from the base.

    ``…_equal`` are those from the base with as many passes; ``pairs_…`` is how many images were
    compared. Text that a spreadsheet would take for a formula starts with an apostrophe.
    """
    file = io.StringIO()
    writer = csv_module.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in (row for of_task in rows(results).values() for row in of_task):
        for entry in (entry for entry in row.entries if entry.estimate is not None):
            cell = row.cell
            line = {"task": row.task.key, "variant": row.variant, "label": row.label}
            line |= {"metric": entry.metric.key, "method": cell.method if cell else ""}
            line |= {name: getattr(entry.metric, name) for name in ("unit", "better")}
            line |= {name: getattr(entry.estimate, name) for name in ("mean", "se")}
            line |= {name: getattr(cell, name) for name in OF_CELL if cell}
            for against, found in entry.verdicts.items():
                line |= {f"{name}_{against}": getattr(found.paired, name) for name in DIFFERENCE}
                line[f"significant_{against}"] = str(found.paired.significant).lower()
            writer.writerow({name: _harmless(value) for name, value in line.items()})
    return file.getvalue()


def _harmless(value: object) -> object:
    formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if formula else value
