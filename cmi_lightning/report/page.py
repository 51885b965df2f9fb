"""The report of a table: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import hashlib
import itertools
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cmi_lightning.files import write
from cmi_lightning.report import panels, sentences
from cmi_lightning.report.album import Album, gallery
from cmi_lightning.report.plots import labels
from cmi_lightning.report.results import Results
from cmi_lightning.report.verdicts import fixed, mean_text, short, verdicts_of
from cmi_lightning.statistics import Estimate


def write_report(results: Results, folder: Path) -> None:
    """Write ``report.html``: whole or absent, and without need of any other file.

    Args:
        results: the table's.
        folder: where it is written, and what the results' image paths are relative to.
    """
    write(folder / "report.html", render(results, folder).encode("utf-8", "replace"))


def render(results: Results, folder: Path) -> str:
    """Return the report's HTML."""
    environment, album = _environment(), Album(results, folder)
    style, script = (
        Markup(f"\n{environment.get_template(name).render()}\n")
        for name in ("report.css.j2", "report.js.j2")
    )
    outcomes, pairs = sentences.outcomes(results), itertools.product(results.cells, results.metrics)
    verdicts = [v for cell, metric in pairs for v in verdicts_of(cell, metric).values()]
    return environment.get_template("report.html.j2").render(
        results=results,
        album=album,
        outcomes=outcomes,
        lead=list(sentences.sentences(results, outcomes)),
        cost=sentences.cost(results),
        fewer_pairs=any(verdict.fewer is not None for verdict in verdicts),
        against_equal=any(("cmi", "equal") in outcome.counts for outcome in outcomes),
        descends=any(cell.variant == "descent" for cell in results.cells),
        gallery=gallery(album),
        drawn=[cell for cell in results.cells if cell.draws],
        histograms=panels.histograms(results),
        curves_by_task=panels.curves(results),
        extremes=album.extremes(),
        study={t: results.study[t.key] for t in results.tasks if results.study.get(t.key)},
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cmi_lightning.report"),
        autoescape=True,  # labels and ids come from users' files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"fixed": fixed, "labels": labels, "value": _value}
    environment.globals |= {"mean_text": mean_text, "verdicts_of": verdicts_of}
    environment.globals["sentences"] = sentences
    environment.filters |= {"short": short, "percent": _percent, "estimate": _estimate}
    return environment


def _value(number: float | None) -> float | str:
    """Return what the script sorts by."""
    return "" if number is None else number


def _percent(estimate: Estimate) -> str:
    """Return "41 %" or "41.2 ± 1.3 %"."""
    if estimate.mean is None or estimate.se is None:
        return "–" if estimate.mean is None else f"{100 * estimate.mean:.0f} %"
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.se:.1f} %"


def _estimate(estimate: Estimate) -> str:
    """Return "0.80", or "0.803 ± 0.021" where there is an error."""
    return mean_text(estimate, 2 if estimate.se is None else 3)


def _hash(text: str) -> str:
    """Return what the page's policy calls its one script or style by; nothing else may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
