"""Batches of any loader, brought to one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.errors import InputError, counted
from cmi_lightning.predict.fingerprint import digest

FORM = (
    'A batch must be a tensor of images (B, C, H, W) in [−1, 1], or {"x": images, "id": names} '
    '(for measurements "y_image" in place of "x", or "y" of the sampler\'s own operator)'
)
KEYS = ("y", "x", "y_image")
ROUNDING = 1e-3  # on [−1, 1]: what resizing and float16 leave


def as_batch(batch: Any, first: int) -> tuple[dict[str, Any], list[str]]:
    """Return a batch in the form that data modules give, and notes on what was done to it.

    Images may come as a tensor or array, first in a tuple, as one image (C, H, W), or as uint8;
    ids as numbers, or not at all: they are then the places in the loader's order.

    ``first`` is the number of samples before this batch.

    Raises:
        InputError: for another form, or values outside of the range.

    Example:
        >>> batch, notes = as_batch(torch.zeros(2, 1, 8, 8), 4)
        >>> batch["id"]
        ['00004', '00005']
    """
    notes = []
    if isinstance(batch, (list, tuple)) and batch and _is_images(batch[0]):
        batch = {"x": batch[0]}  # (image, label)
    elif _is_images(batch):
        batch = {"x": batch}
    key = next((k for k in KEYS if isinstance(batch, Mapping) and k in batch), None)
    if key == "y":
        return _measurements(batch, first)
    if key is None or not _is_images(batch[key]):
        raise InputError(f"{FORM}; the loader gave {_form(batch)}.")
    batch = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
    if batch[key].ndim == 3:  # a loader with batch_size=None
        batch = {k: v[None] if isinstance(v, Tensor) else [v] for k, v in batch.items()}
        if "factor" in batch:
            batch["factor"] = torch.as_tensor(batch["factor"])
    images: Tensor = batch[key]
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
        notes.append("Images of 8 bits: 0 to 255 became −1 to 1.")
    elif not images.is_floating_point():
        raise InputError(f"{FORM}; the images are {images.dtype}: give float or uint8.")
    _check_range(key, images, batch.get("sigma"))
    if key == "x" and images.numel() and 0 <= float(images.min()) < float(images.max()):
        notes.append("No value of the first batch is below 0; images must be in [−1, 1].")
    return {**batch, key: images, "id": _ids(batch, len(images), first, notes)}, notes


def _ids(batch: Mapping[str, Any], count: int, first: int, notes: list[str]) -> list[str]:
    """Return the samples' names, and note if there are none."""
    if "id" not in batch:
        notes.append("The loader gives no ids: samples are named by their place, 00000, 00001, ….")
        return [f"{first + i:05d}" for i in range(count)]
    ids = batch["id"]
    ids = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
    ids = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
    if len(ids) != count:
        raise InputError(f"{FORM}; got {counted(count, 'image')} and {counted(len(ids), 'id')}.")
    return [str(name) for name in ids]


def _measurements(batch: Mapping[str, Any], first: int) -> tuple[dict[str, Any], list[str]]:
    """Return a batch of measurements ``"y"`` of the sampler's operator, of any shape."""
    notes: list[str] = []
    batch = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
    y = batch["y"]
    if not isinstance(y, Tensor) or y.ndim < 2 or not y.is_floating_point():
        raise InputError(f'"y" must be a tensor (B, *m) of real numbers, not {_form(y)}.')
    if not bool(torch.isfinite(y).all()):
        raise InputError('"y" has values that are no numbers.')
    if "x" in batch:
        if not _is_images(batch["x"]) or len(batch["x"]) != len(y):
            raise InputError(f'"x" must be the {len(y)} true images, not {_form(batch["x"])}.')
        _check_range("x", batch["x"], None)
    return {**batch, "id": _ids(batch, len(y), first, notes)}, notes


def _is_images(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim in (3, 4)


def _check_range(key: str, images: Tensor, sigma: Any) -> None:
    """Refuse values that can be no image in [−1, 1], or no measurement of one."""
    most = 1 + ROUNDING
    if key != "x":  # noise, and what a reduction overshoots
        most = 2 + 8 * max(1.0, float(torch.as_tensor(sigma).max()) if sigma is not None else 1.0)
    if not bool(torch.isfinite(images).all()):
        raise InputError(f'"{key}" has values that are no numbers.')
    if images.numel() and float(images.abs().max()) > most:
        low, high = float(images.min()), float(images.max())
        raise InputError(
            f'"{key}" has values from {low:g} to {high:g}; images must be in [−1, 1]: divide by '
            "their range, or give uint8."
        )


def _form(value: Any) -> str:
    """Return the form of a batch, for people."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{k}": {_form(v)}' for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(_form, value[:3]))
        return f"[{shown}{', …' if len(value) > 3 else ''}]"
    return type(value).__name__


def images_of(batch: Mapping[str, Any]) -> Tensor:
    """Return what a batch in the form of :func:`as_batch` holds of its samples."""
    return next(batch[key] for key in KEYS if key in batch)


def take(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return some rows of a batch; what is not one a sample stays whole."""
    rows, count = list(rows), len(batch["id"])

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim and len(value) == count else value
        if isinstance(value, (list, tuple)) and len(value) == count:
            return [value[i] for i in rows]
        return value

    return {key: part(value) for key, value in batch.items()}


def checksums(batch: Mapping[str, Any]) -> list[str]:
    """Return a checksum of each sample's own tensors and names.

    >>> len(checksums({"x": torch.zeros(2, 1, 4, 4), "id": ["a", "b"]}))
    2
    """
    rows = [take(batch, [i]) for i in range(len(batch["id"]))]
    return [digest(*(v[0] for _, v in sorted(row.items()) if _own(v))) for row in rows]


def _own(value: Any) -> bool:
    """Whether a value of a one-row batch is the row's."""
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
