"""Means, standard errors and the final table of the per-image metrics."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from cmi_lightning.errors import counted
from cmi_lightning.files import read_json
from cmi_lightning.paths import inside
from cmi_lightning.statistics import mean_and_error

Statistics = dict[str, float | int | None]
ROWS = {  # metric: label, and digits shown
    "psnr": ("PSNR in dB ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "lpips": ("LPIPS ↓", 4),
    "fid": ("FID ↓", 2),
    "kid": ("KID ↓", 4),
    "residual": ("‖y − A x̂‖", 3),
}
COSTS = {
    "forwards": "network forwards",
    "vjps": "backward passes",
    "second_order": "  of second order",
}
SSIM_WINDOW = 11
SHOWN = 5  # failures that a note names
PROTOCOL = {
    "pixels": "clamped to [0, 1] and rounded to 8 bits, as saved",
    "data_range": 1.0,
    "psnr": "per image over all its pixels and channels, then averaged",
    "ssim": f"per image, Gaussian window {SSIM_WINDOW} of sd 1.5, K = 0.01 and 0.03, reflected "
    "borders, averaged over pixels and channels",
    "residual": "norm of y - A x of the restoration before clamping",
}


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as CSV, with every column that some row has."""
    file = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(file, list(columns), restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return file.getvalue()


def costs(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what an image, and a step of it, cost on average in passes through the network."""
    result: dict[str, dict[str, float]] = {}
    for name in COSTS:
        total = math.fsum(record[name] for record in records)
        steps = sum(record["steps"] for record in records)
        if records:
            result[name] = {"per_image": total / len(records), "per_step": total / steps}
    return result


def timing(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return seconds per image and step, and the peak memory, of the samples' ``timings/``."""
    took, steps = [], 0
    for record in records:
        with contextlib.suppress(FileNotFoundError):
            path = inside(folder / "timings", record["id"], ".json")
            took.append(read_json(path))
            steps += record["steps"]
    if not took:
        return {}
    total = math.fsum(t["seconds"] for t in took)
    return {
        "seconds": {"per_image": total / len(took), "per_step": total / steps},
        "peak_memory": {  # in bytes
            "most": max(t["peak_memory"] for t in took),
            "per_image": max(t["peak_memory"] / t["batch"] for t in took),
            "of": "GPU" if took[0]["device"].startswith("cuda") else "process",
        },
    }


def given_up(failed: Mapping[str, str], count: int, skipped: Mapping[str, str]) -> list[str]:
    """Return notes on samples that were given up and files that were left out."""
    notes = []
    if failed:
        told = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:SHOWN])
        more = "; …" if len(failed) > SHOWN else ""
        notes.append(
            f"{len(failed)} of {counted(count, 'image')} failed; the means leave them out "
            f"({told}{more})."
        )
    if skipped:
        notes.append(f"Files that could not be read and were left out: {len(skipped)}.")
    return notes


def statistics(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Statistics], list[str]]:
    """Return mean, standard error and count of every column of numbers, and notes on odd values.

    A mean that is not a finite number is None, and a note says why; so is the standard error of one
    image.
    """
    result: dict[str, Statistics] = {}
    notes = []
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in ("id", "failed"):
            continue
        values = [float(row[name]) for row in rows if row.get(name, "") != ""]
        odd = [v for v in values if not math.isfinite(v)]
        if odd:
            kind = "not a number (diverged)" if any(map(math.isnan, odd)) else "infinite (no error)"
            notes.append(
                f"{name} is {kind} for {len(odd)} of {counted(len(values), 'image')}, so it has "
                f"no mean; see "
                "metrics.csv."
            )
        mean = mean_and_error([] if odd else values)
        result[name] = {"mean": mean.mean, "standard_error": mean.se, "count": len(values)}
    if len(rows) == 1:
        notes.append("One image has no standard error.")
    return result, notes


def means(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the means that are numbers, as loggers get them."""
    return {f"metrics/{k}": v["mean"] for k, v in metrics.items() if v["mean"] is not None}


def plus_minus(mean: float | None, error: float | None, digits: int) -> str:
    """Return "18.80 ± 0.29", without what is absent."""
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def print_table(result: Mapping[str, Any], took: Mapping[str, Any], folder: Path) -> None:
    """Print ``summary.json`` and ``timing.json`` of a folder: mean ± standard error, and notes."""
    metrics: Mapping[str, Statistics] = result["metrics"]

    def cell(name: str, digits: int) -> str:
        if name not in metrics:
            return "–"
        text = plus_minus(metrics[name]["mean"], metrics[name]["standard_error"], digits)
        return "see notes" if text == "–" else text

    rows = [
        (label, cell(f"{name}_measurement", digits), cell(name, digits))
        for name, (label, digits) in ROWS.items()
        if name in metrics
    ]
    if "expected_residual" in metrics:
        rows.append(("  of the noise alone, σ√m", "", cell("expected_residual", 3)))
    if took:
        rows.append(("seconds per image", "", f"{took['seconds']['per_image']:.4g}"))
    for name, label in COSTS.items():
        cost = result["costs"].get(name)
        if cost and (cost["per_image"] or name != "second_order"):
            rows.append((label, "", f"{cost['per_image']:.4g}"))
    if took and (most := took["peak_memory"]["most"]):
        of = f"peak memory of the {took['peak_memory']['of']}"
        rows.append((of, "", f"{most / 2**30:.3g} GiB"))
    files = f"Per image: {folder / 'metrics.csv'}; all of this: {folder / 'summary.json'}"
    title = f"{counted(result['images'], 'image')}, mean ± standard error"
    show(title, ("measurement A⁺y", "restored"), rows, [*result["notes"], files])


def show(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    """Print a table, if it has rows, and notes below it."""
    console = rich.get_console()
    shown = Table(title=title, title_justify="left")
    for heading in ("", *headings):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    if rows:
        console.print(shown)
    for note in notes:
        console.print(f"• {note}", highlight=False, soft_wrap=True, markup=False)
