"""Means, standard errors and the final table of the per-image metrics."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import rich
from rich.table import Table

Statistics = dict[str, float | int | None]
ROWS = {  # metric: label, and digits shown
    "psnr": ("PSNR in dB ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "lpips": ("LPIPS ↓", 4),
    "fid": ("FID ↓", 2),
    "residual": ("‖y − A x̂‖", 3),
}
SSIM_WINDOW = 11
PROTOCOL = {
    "pixels": "clamped to [0, 1] and rounded to 8 bits, as saved",
    "data_range": 1.0,
    "psnr": "per image over all its pixels and channels, then averaged",
    "ssim": f"per image, Gaussian window {SSIM_WINDOW} of sd 1.5, K = 0.01 and 0.03, reflected "
    "borders, averaged over pixels and channels",
    "residual": "norm of y - A x of the restoration before clamping",
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Sequence[Mapping[str, object]], new: bool) -> None:
    """Write rows (all with the first one's columns) to a CSV file, at its end unless ``new``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0]) if new else None
    if columns is None:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def merge_fragments(trainer: L.Trainer, path: Path) -> None:
    """Join the fragments of all processes on the first one."""
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        fragments = [path.with_name(f"metrics.rank{r}.csv") for r in range(trainer.world_size)]
        rows = [row for fragment in fragments for row in read_rows(fragment)]
        if rows:
            append_rows(path, rows, new=True)
        for fragment in fragments:
            fragment.unlink(missing_ok=True)
    trainer.strategy.barrier()


def statistics(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, Statistics], list[str]]:
    """Return mean, standard error and count of every column but the id, and notes on odd values.

    A mean that is not a finite number is None, and a note says why; so is the standard error of one
    image.
    """
    result: dict[str, Statistics] = {}
    notes = []
    for name in rows[0] if rows else ():
        if name == "id":
            continue
        values = [float(row[name]) for row in rows if row[name]]
        odd = [v for v in values if not math.isfinite(v)]
        if odd:
            kind = "not a number (diverged)" if any(map(math.isnan, odd)) else "infinite (no error)"
            notes.append(
                f"{name} is {kind} for {len(odd)} of {len(values)} images, so it has no mean; see "
                "metrics.csv."
            )
        mean = None if odd or not values else math.fsum(values) / len(values)
        error = None
        if mean is not None and len(values) > 1:
            squares = math.fsum((v - mean) ** 2 for v in values)
            error = math.sqrt(squares / (len(values) - 1) / len(values))
        result[name] = {"mean": mean, "standard_error": error, "count": len(values)}
    if len(rows) == 1:
        notes.append("One image has no standard error.")
    return result, notes


def print_table(result: Mapping[str, Any], folder: Path) -> None:
    """Print mean ± standard error of measurement and restoration, then the notes.

    Args:
        result: the content of ``summary.json``.
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
    for name in ("seconds", "forwards", "vjps"):
        if name in metrics and metrics[name]["mean"] is not None:
            unit = {"seconds": "seconds per image", "forwards": "network forwards"}
            table.add_row(unit.get(name, "backward passes"), "", f"{metrics[name]['mean']:.4g}")
    console.print(table)
    files = f"Per image: {folder / 'metrics.csv'}; all of this: {folder / 'summary.json'}"
    for note in [*result["notes"], files]:
        console.print(f"• {note}", highlight=False, soft_wrap=True, markup=False)
