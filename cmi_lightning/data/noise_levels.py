"""The noise level of each given measurement: from a table, or estimated from the image."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.errors import InputError, counted, printable

Range = Literal["signed", "unit"]
COLUMNS = ["id", "sigma"]
SMALLEST, LARGEST = 1e-6, 1e6  # float32 squares standard deviations without under- or overflow
MAX_BYTES = 64 * 2**20
MIN_COEFFICIENTS = 64  # their median has a standard error of 1.17/√n, 15 %
CLIPPED = 0.05
HIDDEN = 0.01  # on [−1, 1]: little more than the rounding to 8 bits leaves
QUARTILE = 0.6744897501960817  # of |z|, z ~ N(0, 1): its median
NUM_REPORTED = 5


def sigmas_of(
    path: Path, names: Collection[str], known: Collection[str], unit: Range
) -> dict[str, float]:
    """Return {id: standard deviation on [−1, 1]} of measurements, by a CSV file's id and sigma.

    Its numbers refer to images in [−1, 1] ("signed") or [0, 1] ("unit").

    Raises:
        InputError: naming the file, the line and the remedy: if it lacks one of the names, and for
            an id that is not known, too.
    """
    what = f"data.sigmas: '{printable(path)}'"
    if not path.is_file():
        raise InputError(
            f"data.sigmas: there is no file '{printable(path)}'; give a CSV file with the "
            "columns id,sigma, or the word estimate."
        )
    sigmas: dict[str, float] = {}
    for line, row in _rows(path, what):
        where = f"{what}, line {line}"
        if len(row) != len(COLUMNS):
            raise InputError(f"{where}: {counted(len(row), 'cell')}, not 2; write id,sigma.")
        name = unicodedata.normalize("NFC", row[0])
        shown = printable(name[:200])
        if name not in known:
            raise InputError(
                f"{where}: there is no measurement '{shown}'; ids are paths in data.measurements "
                "without suffix."
            )
        if name in sigmas:
            raise InputError(f"{where}: '{shown}' occurs a second time; remove one.")
        try:
            sigma = float(row[1].replace("_", "?")) * (2 if unit == "unit" else 1)
        except ValueError:
            sigma = float("nan")
        if not SMALLEST <= sigma <= LARGEST:
            raise InputError(
                f"{where}: sigma of '{shown}' must be a number above 0, got "
                f"'{printable(row[1][:40])}' (without noise: leave data.sigmas out and set "
                "model.noise.sigma=0)."
            )
        sigmas[name] = sigma
    if missing := [name for name in names if name not in sigmas]:
        raise InputError(
            f"{what} has no sigma for {len(missing)} of {len(names)} measurements, such as "
            f"'{missing[0]}'; add them."
        )
    return {name: sigmas[name] for name in names}


def _rows(path: Path, what: str) -> list[tuple[int, list[str]]]:
    """Return the lines of a CSV file after its heading, with their numbers."""
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{what} has more than {MAX_BYTES} bytes; give a smaller table.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, ValueError, csv.Error) as error:
        reason = printable(error.strerror if isinstance(error, OSError) else error)
        raise InputError(
            f"{what} is no UTF-8 CSV file ({type(error).__name__}: {reason}); give one with the "
            "columns id,sigma."
        ) from error
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if header != COLUMNS:
        raise InputError(
            f"{what} must start with the line id,sigma (a comma between); it starts with "
            f"'{printable(','.join(rows[0][1])[:80]) if rows else ''}'."
        )
    return rows[1:]


def estimate_sigma(y: Tensor, known: Tensor | None = None) -> float:
    """Return σ̂ = median|d| / 0.6745 of white noise in one image, averaged over its channels.

    d are the diagonal detail coefficients of the finest level of the orthogonal wavelet db2, to
    which smooth images contribute little; those that saw a missing pixel are left out. Nothing
    missing: equal to ``skimage.restoration.estimate_sigma``. Image detail makes it too high
    (garments of 32×32: by 11, 3 and 0 % at σ = 0.1, 0.2 and 0.3), values clipped at black and
    white too low (the same garments, whose background is black, saved as PNG: by 29, 34 and 38 %).

    Args:
        y: (C, H, W), in units of images in [−1, 1].
        known: (H, W) bool; None: every pixel is.

    Raises:
        ValueError: in half a sentence, if too few coefficients are left, or all are zero.

    Source: Donoho & Johnstone (1994), section 4.2.
    """
    import pywt  # imported late: seldom needed

    def diagonal(image: Tensor, wavelet: pywt.Wavelet) -> np.ndarray:
        return np.asarray(pywt.dwt2(image.double().cpu().numpy(), wavelet)[1][2])

    db2 = pywt.Wavelet("db2")
    detail = diagonal(y, db2)
    use = np.ones(detail.shape[1:], bool)
    if known is not None:
        size = pywt.Wavelet("|db2|", filter_bank=np.abs(db2.filter_bank))
        use = diagonal(~known, size) < 1e-9
    if use.sum() < MIN_COEFFICIENTS:
        raise ValueError(f"only {use.sum()} of at least {MIN_COEFFICIENTS} wavelet coefficients")
    sigmas = []
    for channel in np.abs(detail[:, use]):
        sigmas.append(np.median(channel[channel > 0]) / QUARTILE if channel.any() else 0.0)
    sigma = float(np.mean(sigmas))
    if not SMALLEST <= sigma <= LARGEST:
        raise ValueError("it shows no noise")
    return sigma


def estimate_of(name: str, y: Tensor, known: Tensor | None) -> tuple[float, bool]:
    """Return :func:`estimate_sigma`, and whether so many pixels are clipped that it is too low.

    Raises:
        InputError: naming the image, if it cannot be estimated.
    """
    try:
        sigma = estimate_sigma(y, known)
    except ValueError as error:
        raise InputError(
            f"data.sigmas=estimate: the noise of '{name}' cannot be estimated ({error}); give it "
            "in a CSV file, or set model.noise.sigma and leave data.sigmas out."
        ) from error
    seen = y if known is None else y[:, known]
    return sigma, float((seen.abs() >= 1).float().mean()) > CLIPPED


def report_estimates(sigmas: Mapping[str, float], clipped: Collection[str]) -> None:
    """Print the estimates: the first five, and their range."""
    first = ", ".join(f"{name} {s:.4g}" for name, s in list(sigmas.items())[:NUM_REPORTED])
    values = torch.tensor(list(sigmas.values()))
    print(
        f"noise: σ on [−1, 1] estimated by wavelets: {first}"
        + (", …" if len(sigmas) > NUM_REPORTED else "")
        + f" ({counted(len(sigmas), 'image')}, from {values.min():.4g} to {values.max():.4g}, "
        f"median "
        f"{values.median():.4g})"
    )
    if values.min() < HIDDEN:
        print(
            f"noise: σ below {HIDDEN} is rarely the whole error: JPEG and blur hide noise from the "
            "estimate. For blur above all, leave data.sigmas out and set model.noise.sigma, say "
            "0.05"
        )
    if clipped:
        print(
            f"noise: in {counted(len(clipped), 'image')} more than {CLIPPED:.0%} of the values "
            f"are black or "
            "white, where noise is cut off, so that σ is likely higher than estimated"
        )
