"""The table as text: Markdown, long CSV, LaTeX."""

from __future__ import annotations

import csv as csv_module
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmi_lightning.files import write
from cmi_lightning.report.verdicts import (
    AGAINST,
    Results,
    Verdict,
    cell_label,
    heading,
    mean_text,
    number,
    other_images,
    short,
)

MEASURED = "measurement A⁺y"
COLUMNS = (
    *("task", "method", "variant", "label", "metric", "unit", "better", "mean", "se"),
    *("images", "failed", "steps", "passes", "seconds"),
    *(
        f"{name}_{against}"
        for against in AGAINST
        for name in ("difference", "low", "high", "p", "significant", "improved", "pairs")
    ),
)
COLOURS = {
    "better": "A6DBAE",
    "better-unsure": "E6F4E8",
    "worse": "F2B3AC",
    "worse-unsure": "FBE9E7",
}
LATEX_SYMBOL = {
    "▲": r"\blacktriangle",
    "▼": r"\blacktriangledown",
    "△": r"\vartriangle",
    "▽": r"\triangledown",
    "=": "=",
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
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~&!$])")


def write_tables(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.tex``."""
    for name, text in (("md", markdown), ("csv", csv), ("tex", latex)):
        write(folder / f"table.{name}", text(results).encode("utf-8", "replace"))


# Markdown ------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table as Markdown: a row per cell, with CMI's paired differences beside."""
    known = Results(results)
    head = ["task", "method", *(heading(m) for m in known.metrics), "passes", "seconds"]
    lines = [
        f"# {_markdown(results.get('title') or 'Results')}",
        "",
        "Mean ± standard error. Beside CMI's values the paired difference from its base, with its "
        "95 % interval, and n where it is over fewer images than the cell has: ▲ better and ▼ "
        "worse after Holm's correction, each metric for itself, △ and ▽ where the difference is "
        "not significant. Passes and seconds are per image.",
        "",
        _row([_markdown(h) for h in head]),
        _row(["---", "---", *["---:"] * (len(head) - 2)]),
    ]
    for task in known.tasks:
        label = known.task_label(task)
        if measured := _measured(results, task):
            means = [mean_text(measured.get(m["key"]), m["digits"]) for m in known.metrics]
            lines.append(_row([_markdown(label), _markdown(MEASURED), *means, "0", "–"]))
        for cell in known.cells(task):
            texts = []
            for metric in known.metrics:
                text = mean_text((cell.get("metrics") or {}).get(metric["key"]), metric["digits"])
                verdict = _of(known, cell, metric)
                if verdict and verdict.difference is not None and cell["variant"] == "cmi":
                    pairs = verdict.fewer(cell)
                    only = f", n = {pairs}" if pairs is not None else ""
                    text += f" ({verdict.symbol} {verdict.text(metric['digits'])}{only})"
                texts.append(text)
            cost = [short(cell.get("passes")), short(cell.get("seconds"))]
            lines.append(_row([_markdown(label), _markdown(_name(results, cell)), *texts, *cost]))
    notes = [f"* {_markdown(note)}" for note in results.get("notes") or ()]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


def _markdown(text: object) -> str:
    return MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def _row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


# CSV -----------------------------------------------------------------------------------------


def csv(results: Mapping[str, Any]) -> str:
    """Return a row per cell and metric, numbers in full; ``…_base`` are differences from the base.

    ``…_equal`` are those from the base with as many passes; ``pairs_…`` is how many images were
    compared. Text that a spreadsheet would take for a formula starts with an apostrophe.
    """
    known = Results(results)
    file = io.StringIO()
    writer = csv_module.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for task in known.tasks:
        measured = _measured(results, task)
        rows: list[Mapping[str, Any]] = list(known.cells(task))
        if measured:
            first = {"task": task, "method": "", "variant": "measured", "label": MEASURED}
            rows.insert(0, first | {"metrics": measured})
        for cell in rows:
            for metric in known.metrics:
                entry = (cell.get("metrics") or {}).get(metric["key"])
                if not entry:
                    continue
                row = {"task": task, "method": cell["method"], "variant": cell["variant"]}
                row |= {"label": cell_label(cell), "metric": metric["key"]}
                row |= {name: metric.get(name) for name in ("unit", "better")}
                row |= {name: entry.get(name) for name in ("mean", "se")}
                row |= {name: cell.get(name) for name in COLUMNS[9:14]}
                for against in AGAINST:
                    verdict = _of(known, cell, metric, against)
                    if verdict:
                        row |= {
                            f"{name}_{against}": getattr(verdict, name)
                            for name in ("difference", "low", "high", "p", "improved", "pairs")
                        }
                        significant = verdict.significant
                        row[f"significant_{against}"] = (
                            None if significant is None else str(significant).lower()
                        )
                writer.writerow({name: _harmless(value) for name, value in row.items()})
    return file.getvalue()


def _harmless(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


# LaTeX ---------------------------------------------------------------------------------------


def latex(results: Mapping[str, Any]) -> str:
    r"""Return a ``tabular`` with booktabs' rules; CMI's cells in green or red, and a triangle.

    Needs the packages booktabs, amssymb and xcolor (with the option ``table``).
    """
    known = Results(results)
    columns = len(known.metrics) + 2
    head = ["", *(_latex(heading(m)) for m in known.metrics), "passes"]
    lines = [
        f"% {' '.join(str(results.get('title') or 'Results').split())}",
        r"% \usepackage{booktabs, amssymb} \usepackage[table]{xcolor}",
        "% Green: CMI better than its base, red: worse; pale and with an open triangle: not",
        "% significant after Holm's correction, each metric for itself. Mean and standard error;",
        "% passes per image.",
        *(f"\\definecolor{{cmi-{name}}}{{HTML}}{{{code}}}" for name, code in COLOURS.items()),
        f"\\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
        r"\toprule",
        f"{' & '.join(head)} \\\\",
    ]
    for task in known.tasks:
        label = _latex(known.task_label(task))
        lines += [r"\midrule", f"\\multicolumn{{{columns}}}{{l}}{{\\emph{{{label}}}}} \\\\"]
        if measured := _measured(results, task):
            means = [_math(measured.get(m["key"]), m["digits"]) for m in known.metrics]
            lines.append(f"{' & '.join([_latex(MEASURED), *means, '0'])} \\\\")
        for cell in known.cells(task):
            texts = [_latex(_name(results, cell))]
            for metric in known.metrics:
                text = _math((cell.get("metrics") or {}).get(metric["key"]), metric["digits"])
                verdict = _of(known, cell, metric)
                if verdict and verdict.symbol and cell["variant"] == "cmi":
                    colour = f"\\cellcolor{{cmi-{verdict.name}}}" if verdict.name != "none" else ""
                    text = f"{colour}{text} ${LATEX_SYMBOL[verdict.symbol]}$"
                texts.append(text)
            texts.append(_latex(short(cell.get("passes"))))
            lines.append(f"{' & '.join(texts)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex(text: object) -> str:
    return "".join(LATEX.get(c, c) for c in " ".join(str(text).split()))


def _math(entry: Mapping[str, Any] | None, digits: int) -> str:
    if not entry or number(entry.get("mean")) is None:
        return "--"
    return f"${mean_text(entry, digits).replace('−', '-').replace('±', chr(92) + 'pm')}$"


# Both ----------------------------------------------------------------------------------------


def _measured(results: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    return ((results.get("measured") or {}).get(task) or {}).get("metrics") or {}


def _name(results: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Return how a cell is called, with its number of images where that is its own."""
    images = other_images(results, cell)
    return cell_label(cell) + (f", {images} images" if images is not None else "")


def _of(
    known: Results, cell: Mapping[str, Any], metric: Mapping[str, Any], against: str = "base"
) -> Verdict | None:
    return known.verdict(cell["task"], cell["method"], metric, cell["variant"], against)
