"""``cmi-lightning info FOLDER``: what a run's folder holds."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from cmi_lightning.errors import InputError, counted, printable
from cmi_lightning.files import read_json


def info(args: list[str]) -> int:
    """Print what the folders of runs hold; 1 if images of one were given up."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: cmi-lightning info FOLDER...\n\nPrint what the folders of runs hold.")
        return 0
    failed = False
    for name in args:
        lines, bad = described(Path(name).expanduser())
        failed = failed or bad
        print("\n".join(lines))
    return int(failed)


def described(folder: Path) -> tuple[list[str], bool]:
    """Return lines about a run's folder, and whether images were given up.

    Raises:
        InputError: if it holds no run.
    """
    options = _json(folder / "run.json")
    if not isinstance(options, dict):
        raise InputError(
            f"'{printable(folder)}' holds no run: there is no run.json that `predict` wrote."
        )
    paths = (folder / "records").rglob("*.json")
    records = [r for path in paths if isinstance(r := _json(path), dict) and "id" in r]
    failures = {r["id"]: r["failed"] for r in records if r.get("failed")}
    lines = [
        f"{printable(folder)}: {counted(len(records), 'image')} done, {len(failures)} given up"
    ]
    lines += [f"  {printable(name)}: {printable(why)}" for name, why in list(failures.items())[:5]]
    kinds = ("denoiser", "operator", "solver", "num_steps", "samples_per_image", "noise", "seed")
    shown = {kind: options.get(f"model.{kind}") for kind in kinds}
    shown |= {k.removeprefix("model."): v for k, v in options.items() if _is_guidance(k)}
    lines += [f"  {kind:19} {printable(value)}" for kind, value in shown.items() if value]
    lines += [f"  {name:20}{value}" for name, value in _means(records).items()]
    files = Counter(p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.is_file())
    held = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in sorted(files.items()))
    return [*lines, f"  {'files':20}{printable(held)}"], bool(failures)


def _is_guidance(option: str) -> bool:
    return option.startswith("model.guidances.") and option.count(".") <= 3


def _means(records: list[dict[str, Any]]) -> dict[str, str]:
    """Return the mean of each metric that all finished images have."""
    well = [record for record in records if not record.get("failed")]
    means = {}
    for name in ("psnr", "ssim", "lpips"):
        values = [r[name] for r in well if isinstance(r.get(name), (int, float))]
        if values and all(map(math.isfinite, values)):
            means[name] = (
                f"{sum(values) / len(values):.4g} (mean of {counted(len(values), 'image')})"
            )
    return means


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
