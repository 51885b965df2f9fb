"""Means, standard errors and the final table of the per-image metrics."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

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
    for name in ("forwards", "vjps", "second_order"):
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
            took.append(json.loads(path.read_text(encoding="utf-8")))
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
            f"{len(failed)} of {count} images failed and are left out of the means ({told}{more})."
        )
    if skipped:
        notes.append(f"{len(skipped)} files could not be read and were left out.")
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
                f"{name} is {kind} for {len(odd)} of {len(values)} images, so it has no mean; see "
                "metrics.csv."
            )
        found = mean_and_error([] if odd else values)
        result[name] = {"mean": found.mean, "standard_error": found.se, "count": len(values)}
    if len(rows) == 1:
        notes.append("One image has no standard error.")
    return result, notes


def means(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the means that are numbers, as loggers get them."""
    return {f"metrics/{k}": v["mean"] for k, v in metrics.items() if v["mean"] is not None}


def print_table(result: Mapping[str, Any], took: Mapping[str, Any], folder: Path) -> None:
    """Print mean ± standard error of measurement and restoration, then the notes.

    Args:
        result: the content of ``summary.json``.
        took: the content of ``timing.json``.
        folder: where the files are.
    """
    metrics: Mapping[str, Statistics] = result["metrics"]

    def cell(name: str, digits: int) -> str:
        if name not in metrics:
            return "–"
        mean, error = metrics[name]["mean"], metrics[name]["standard_error"]
        if mean is None:
            return "see notes"
        return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    console = rich.get_console()
    table = Table(title=f"{result['images']} images, mean ± standard error", title_justify="left")
    for heading in ("", "measurement A⁺y", "restored"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, (label, digits) in ROWS.items():
        if name in metrics:
            table.add_row(label, cell(f"{name}_measurement", digits), cell(name, digits))
    if "expected_residual" in metrics:
        table.add_row("  of the noise alone, σ√m", "", cell("expected_residual", 3))
    labels = {"forwards": "network forwards", "vjps": "backward passes"}
    labels["second_order"] = "  of second order"
    if took:
        table.add_row("seconds per image", "", f"{took['seconds']['per_image']:.4g}")
    for name, label in labels.items():
        if name in result["costs"] and (
            name != "second_order" or result["costs"][name]["per_image"]
        ):
            table.add_row(label, "", f"{result['costs'][name]['per_image']:.4g}")
    if took and took["peak_memory"]["most"]:
        memory = took["peak_memory"]
        table.add_row(f"peak memory of the {memory['of']}", "", f"{memory['most'] / 2**30:.3g} GiB")
    console.print(table)
    files = f"Per image: {folder / 'metrics.csv'}; all of this: {folder / 'summary.json'}"
    for note in [*result["notes"], files]:
        console.print(f"• {note}", highlight=False, soft_wrap=True, markup=False)
