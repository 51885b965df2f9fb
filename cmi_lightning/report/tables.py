"""The table as Markdown, long CSV and LaTeX."""

from __future__ import annotations

import csv as csv_module
import io
from functools import cache
from pathlib import Path
from statistics import median

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmi_lightning.errors import counted
from cmi_lightning.files import write
from cmi_lightning.report.results import AGAINST, Results
from cmi_lightning.report.verdicts import fixed, mean_text, percent, short, verdicts_of

DIFFERENCE = ("difference", "low", "high", "p", "significant", "improved", "pairs")
OF_ROW = ("task", "method", "variant", "label")
OF_CELL = ("images", "failed", "steps", "passes", "seconds")
COLUMNS = (
    *(*OF_ROW, "metric", "unit", "better", "mean", "se"),
    *(*OF_CELL, *(f"{name}_{against}" for against in AGAINST for name in DIFFERENCE)),
)
LATEX = str.maketrans({
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
})  # fmt: skip
SYMBOLS = str.maketrans({
    "▲": r"\blacktriangle",
    "▼": r"\blacktriangledown",
    "△": r"\vartriangle",
    "▽": r"\triangledown",
    "−": "-",
    "±": r"\pm",
})  # fmt: skip
MARKDOWN = str.maketrans({c: f"\\{c}" for c in r"\`*_{}[]<>|#~&!$"})


def write_tables(results: Results, folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.tex``."""
    for name, text in (("md", markdown), ("csv", csv), ("tex", latex)):
        write(folder / f"table.{name}", text(results).encode("utf-8", "replace"))


def markdown(results: Results) -> str:
    """Return the table as Markdown: a row per cell, with CMI's paired differences beside."""
    return environment().get_template("table.md.j2").render(results=results)


def latex(results: Results) -> str:
    r"""Return a ``tabular`` with booktabs' rules; CMI's cells in green or red, and a triangle.

    Needs the packages booktabs, amssymb and xcolor (with the option ``table``).
    """
    return environment().get_template("table.tex.j2").render(results=results)


@cache
def environment(html: bool = False) -> Environment:
    """Return what renders templates of HTML, or those that leave braces to LaTeX."""
    made = Environment(
        loader=PackageLoader("cmi_lightning.report"),
        autoescape=True,  # labels and ids come from users' files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    tools = (counted, enumerate, fixed, mean_text, median, percent, short, verdicts_of)
    made.globals |= {tool.__name__: tool for tool in tools}
    made.filters["line"] = lambda text: " ".join(text.split())
    made.filters["md"] = lambda text: " ".join(text.split()).translate(MARKDOWN)
    made.filters["tex"] = lambda text: " ".join(text.split()).translate(LATEX)
    made.filters["math"] = lambda text: "--" if text == "–" else f"${text.translate(SYMBOLS)}$"
    return made if html else made.overlay("<%", "%>", "<<", ">>", "<#", "#>", autoescape=False)


def csv(results: Results) -> str:
    """Return a row per cell and metric, numbers in full; ``…_base`` are differences from the base.

    ``…_equal`` are those from the base with as many passes; ``pairs_…`` is how many images were
    compared. Text that a spreadsheet would take for a formula starts with an apostrophe.
    """
    file = io.StringIO()
    writer = csv_module.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for cell in (cell for rows in results.rows().values() for cell in rows):
        for metric in (metric for metric in results.metrics if metric.key in cell.metrics):
            names = OF_ROW if cell.variant == "measured" else OF_ROW + OF_CELL
            line = {name: getattr(cell, name) for name in names} | {"metric": metric.key}
            line |= {name: getattr(metric, name) for name in ("unit", "better")}
            line |= {name: getattr(cell.metrics[metric.key], name) for name in ("mean", "se")}
            for against, found in verdicts_of(cell, metric).items():
                line |= {f"{name}_{against}": getattr(found.paired, name) for name in DIFFERENCE}
                line[f"significant_{against}"] = str(found.paired.significant).lower()
            writer.writerow({name: _harmless(value) for name, value in line.items()})
    return file.getvalue()


def _harmless(value: object) -> object:
    formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if formula else value
