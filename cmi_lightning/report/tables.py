"""The table as text: Markdown, long CSV, LaTeX."""

from __future__ import annotations

import csv as csv_module
import io
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmi_lightning.files import write
from cmi_lightning.report.results import AGAINST, Results
from cmi_lightning.report.rows import Row, rows
from cmi_lightning.report.verdicts import short

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
    for of_task in rows(results).values():
        for row in of_task:
            writer.writerows(_lines(row))
    return file.getvalue()


def _lines(row: Row) -> list[dict[str, object]]:
    cell = row.cell
    first = {"task": row.task.key, "method": cell.method if cell else "", "variant": row.variant}
    first |= {"label": row.label}
    lines = []
    for entry in row.entries:
        if entry.estimate is not None:
            line: dict[str, object] = {**first, "metric": entry.metric.key}
            line |= {name: getattr(entry.metric, name) for name in ("unit", "better")}
            line |= {name: getattr(entry.estimate, name) for name in ("mean", "se")}
            line |= {name: getattr(cell, name) for name in OF_CELL} if cell else {}
            for against, verdict in entry.verdicts.items():
                for name in DIFFERENCE:
                    line[f"{name}_{against}"] = getattr(verdict.paired, name)
                line[f"significant_{against}"] = str(verdict.paired.significant).lower()
            lines.append({name: _harmless(value) for name, value in line.items()})
    return lines


def _harmless(value: object) -> object:
    formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if formula else value
