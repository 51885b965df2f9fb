"""What goes with given measurements: masks and blur kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.data.files import by_id
from cmi_lightning.data.images import SUFFIXES, Decoding, UnreadableError, read_image, to_gray
from cmi_lightning.errors import InputError, cause, printable

Convention = Literal["correlation", "convolution"]
MAX_SIDE = {"kernel": 2048, "mask": 2**14}  # pixels
MAX_GAIN = 100  # Σ|k| / Σk: how much more a kernel may magnify noise than a blur, which has 1
BLACK, WHITE = 0.1, 0.9  # gray values in [0, 1] up to and from which people see these
FEW_LEVELS = 16  # gray values that a drawing may have and a photograph exceeds


def companions(names: Iterable[str], folder: Path, source: Path, option: str) -> dict[str, Path]:
    """Return the mask or kernel of each measurement: one file for all, or one of the same id.

    In the measurements' own folder, companions are ``.npy`` files.

    Raises:
        InputError: if there is not exactly one for each.
    """
    if source.is_file():
        return dict.fromkeys(names, source)
    if not source.is_dir():
        raise InputError(
            f"{option}: there is no '{printable(source)}'; give a file for all images, or a folder "
            "with one for each."
        )
    same = source.resolve() == folder.resolve()
    suffixes = (".npy",) if same else (".png", ".npy", *SUFFIXES)
    found = by_id(source, suffixes)
    result: dict[str, Path] = {}
    for name in names:
        paths = found.get(name, [])
        if len(paths) != 1:
            raise InputError(
                f"{option}: the folder '{printable(source)}' has "
                f"{'more than one file' if paths else 'nothing'} for the measurement '{name}'; "
                f"there must be one '{name}{' or '.join(suffixes[:2])}'."
            )
        result[name] = paths[0]
    return result


def read_mask(path: Path, size: tuple[int, ...] | None = None) -> Tensor:
    """Return a mask (h, w): True where a pixel is known.

    White is known and black is missing, cut at one half. Of two values, one of which is black or
    white, the higher is known: masks of 0 and 1, and brushes of bright colours. Holes in a white
    sheet or in a picture are missing.

    Args:
        path: an image, or a 2-D ``.npy`` array.
        size: the size it must have.

    Raises:
        InputError: if it is unreadable, of another size, black all over, or if it cannot be told
            which pixels are missing.
    """
    _refuse_absent(path, "mask")
    if path.suffix.lower() == ".npy":
        values = torch.from_numpy(_load_array(path, "mask")).float()
        if not values.numel() or not 0 <= values.min() <= values.max() < np.inf:
            raise InputError(f"The mask '{printable(path)}' must hold finite numbers from 0 on.")
        values = values / values.max().clamp(min=1)
        alpha = torch.ones_like(values)
    else:
        x = (read_image(path, Decoding(channels=4)) + 1) / 2
        values, alpha = to_gray(x[:3])[0].round(decimals=6), x[3]
    if size is not None and values.shape != size:
        raise InputError(
            f"The mask '{printable(path)}' is {values.shape[0]}×{values.shape[1]} (height×width) "
            f"and the measurement {size[0]}×{size[1]}; resize it without smoothing, or "
            "give each size a mask of its own."
        )
    try:
        return _known(values, alpha)
    except ValueError as error:
        raise InputError(f"The mask '{printable(path)}' {error}.") from error


def _known(values: Tensor, alpha: Tensor) -> Tensor:
    """Return where gray values (h, w) in [0, 1] say that a pixel is known.

    Raises:
        ValueError: in half a sentence, if they do not say it.
    """
    clear = alpha <= 0.5
    if clear.any():
        seen, hidden = values[~clear], values[clear]
        gray = ((seen > BLACK) & (seen < WHITE)).float().mean() > 0.5
        if len(seen) and (seen.min() >= WHITE or (gray and len(seen.unique()) > FEW_LEVELS)):
            return ~clear
        # Else transparent pixels may be read by their colour, where that contradicts nothing.
        strokes = len(seen) and seen.max() <= BLACK and hidden.min() >= WHITE
        if gray or not (strokes or (len(seen) and hidden.max() <= BLACK)):
            raise ValueError(
                "has transparent pixels and painted ones, and either may be missing; save it as "
                "black (missing) and white, without transparency"
            )
    levels = values.unique()
    if len(levels) == 2 and (levels[0] == 0 or levels[1] == 1):
        return values == levels[1]
    known = values > 0.5
    if not known.any():
        raise ValueError("has no white (known) pixel; is it inverted?")
    if ((values > BLACK) & (values < WHITE)).float().mean() > 0.5:
        raise ValueError(
            "is a picture or a gradient, more than half of its pixels gray; save it as black "
            "(missing) and white"
        )
    if known.all() and values.min() < WHITE:
        raise ValueError(
            "has no black (missing) pixel, but others than white; paint what is missing black"
        )
    return known


def looks_inverted(y: Tensor, known: Tensor) -> bool:
    """Whether known pixels (h, w) of y (C, h, w) are of one colour, and missing ones are not.

    >>> y = torch.eye(3)[None]
    >>> looks_inverted(y, y[0] == 0), looks_inverted(y, y[0] >= 0)
    (False, False)
    >>> looks_inverted(torch.tensor([[[0.0, 0.1, 0.2]]]), torch.tensor([[True, False, False]]))
    True
    """
    seen, hidden = y[:, known], y[:, ~known]
    return bool((seen == seen[:, :1]).all()) and not bool((hidden == hidden[:, :1]).all())


def _refuse_absent(path: Path, what: str) -> None:
    if not path.is_file():
        raise UnreadableError(f"There is no file '{printable(path)}' to take the {what} from.")


def read_kernel(path: Path, convention: Convention = "correlation") -> Tensor:
    """Return a blur kernel (kh, kw) of sum 1, float32, as correlation takes it.

    Args:
        path: a gray image or a 2-D ``.npy`` array.
        convention: of the file; a convolution's kernel is mirrored in both axes about its centre,
            pixel (⌊kh/2⌋, ⌊kw/2⌋), and gets a row or column of zeros where a side is even.

    Raises:
        InputError: if it is unreadable, not 2-D, larger than 2048 pixels a side, not finite, or its
            sum is not positive, or below 1 % of the sum of absolute values.
    """
    _refuse_absent(path, "kernel")
    if path.suffix.lower() == ".npy":
        array = _load_array(path, "kernel")
    else:
        gray = read_image(path, Decoding(channels=1, background="black"))[0]
        array = (gray.double().numpy() + 1) / 2
    with np.errstate(all="ignore"):  # what overflows is refused
        total, size = float(array.sum()), float(np.abs(array).sum())
    if not 0 < total < np.inf or not size < np.inf:
        raise InputError(
            f"The kernel '{printable(path)}' must consist of finite numbers with a positive sum; "
            f"its sum is {total:g}."
        )
    if size > MAX_GAIN * total:
        raise InputError(
            f"The values of the kernel '{printable(path)}' cancel: they cannot be divided by their "
            "sum. Blur kernels are positive."
        )
    if convention == "convolution":
        array = np.pad(array[::-1, ::-1], [(1 - side % 2, 0) for side in array.shape])
    return torch.from_numpy((array / total).astype(np.float32))


def _load_array(path: Path, what: str) -> np.ndarray:
    """Return a 2-D ``.npy`` array of numbers as float64; its header is checked before its data."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(mapped, np.ndarray):
                mapped.close()
                raise ValueError("an archive of arrays")
            if mapped.dtype.kind not in "buif":
                raise ValueError(f"values of type {mapped.dtype}")
            if mapped.ndim != 2 or max(mapped.shape) > MAX_SIDE[what]:
                raise ValueError(f"shape {mapped.shape}")
            return np.array(mapped, np.float64)
    except Exception as error:  # NumPy's parser raises all kinds
        raise UnreadableError(
            f"Cannot read the {what} '{printable(path)}' ({cause(error)[:200]}); save one 2-D "
            f"array of real numbers, at most {MAX_SIDE[what]} a side, with numpy.save."
        ) from error
