"""The report of a table: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import hashlib
import itertools
from pathlib import Path

from markupsafe import Markup

from cmi_lightning.files import write
from cmi_lightning.report import panels, sentences
from cmi_lightning.report.album import Album, gallery
from cmi_lightning.report.plots import labels
from cmi_lightning.report.results import ADDED, Results
from cmi_lightning.report.tables import environment
from cmi_lightning.report.verdicts import verdicts_of


def write_report(results: Results, folder: Path) -> None:
    """Write ``report.html``: whole or absent, and without need of any other file.

    Args:
        results: the table's.
        folder: where it is written, and what the results' image paths are relative to.
    """
    write(folder / "report.html", render(results, folder).encode("utf-8", "replace"))


def render(results: Results, folder: Path) -> str:
    """Return the report's HTML."""
    get, album = environment(html=True).get_template, Album(results, folder)
    style, script = (Markup(f"\n{get(f'report.{kind}.j2').render()}") for kind in ("css", "js"))
    outcomes, pairs = sentences.outcomes(results), itertools.product(results.cells, results.metrics)
    verdicts = [v for cell, metric in pairs for v in verdicts_of(cell, metric).values()]
    return get("report.html.j2").render(
        results=results,
        labels=labels,
        sentences=sentences,
        album=album,
        outcomes=outcomes,
        totals=sentences.totals(outcomes),
        words=ADDED,
        cost=sentences.cost(results),
        fewer_pairs=any(verdict.fewer is not None for verdict in verdicts),
        against_equal=any(("cmi", "equal") in outcome.counts for outcome in outcomes),
        descends=any(cell.variant == "descent" for cell in results.cells),
        gallery=gallery(album),
        drawn=[cell for cell in results.cells if cell.draws],
        histograms=panels.histograms(results),
        curves=panels.curves(results),
        extremes=album.extremes(),
        study={t: results.study[t] for t in results.tasks if results.study.get(t)},
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(text: str) -> str:
    """Return what the page's policy calls its one script or style by; nothing else may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
