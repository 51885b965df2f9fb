"""The report of a table: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cmi_lightning.files import write
from cmi_lightning.report import gallery, panels, protocol, rows, summary, uncertainty
from cmi_lightning.report.verdicts import Results


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.html``: whole or absent, and without need of any other file.

    Args:
        results: the table's results; what is absent or null is left out.
        folder: where it is written, and what the results' image paths are relative to.
    """
    write(folder / "report.html", render(results, folder).encode("utf-8", "replace"))


def render(results: Mapping[str, Any], folder: Path) -> str:
    """Return the report's HTML."""
    environment = _environment()
    style, script = (
        Markup(f"\n{environment.get_template(name).render()}\n")
        for name in ("report.css.j2", "report.js.j2")
    )
    return environment.get_template("report.html.j2").render(
        _shown(Results(results), folder),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cmi_lightning.report"),
        autoescape=True,  # labels and ids come from users' files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _hash(text: str) -> str:
    """Return what the page's policy calls its one script or style by; nothing else may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _shown(known: Results, folder: Path) -> dict[str, Any]:
    """Return everything that the page shows, in its order."""
    results, groups = known.raw, rows.by_task(known)
    return {
        "title": results.get("title") or "Results",
        "facts": _facts(results),
        "outcomes": summary.outcomes(known),
        "sentences": summary.sentences(known),
        "cost": summary.cost(known),
        "notes": list(results.get("notes") or ()),
        "metrics": known.metrics,
        "groups": groups,
        "fewer_pairs": rows.any_fewer_pairs(groups),
        "against_equal": any(known.verdicts(metric, "equal") for metric in known.metrics),
        "gallery": gallery.examples(known, folder),
        "histograms": panels.histograms(known),
        "extremes": gallery.extremes(known, folder),
        "curves_by_task": panels.curves(known),
        "posterior": uncertainty.posterior(known, folder),
        "command": results.get("command"),
        "options": protocol.options(known),
        "study": protocol.study(known),
        "study_images": protocol.study_images(known),
        "objective": protocol.objective(known),
        "definitions": protocol.definitions(known),
        "environment": dict(results.get("environment") or {}),
        "config": results.get("config"),
    }


def _facts(results: Mapping[str, Any]) -> list[str]:
    """Return the line under the title."""
    images, steps = results.get("images"), results.get("steps")
    commit, created = results.get("commit"), results.get("created")
    return [
        *([f"{images} images"] if images else []),
        *([f"{steps} steps"] if steps else []),
        *([str(created)] if created else []),
        *([f"commit {str(commit)[:12]}"] if commit else []),
    ]
