"""Given measurements of one's own operator: arrays of any shape, from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cmi_lightning.data.extras import companions
from cmi_lightning.data.files import FolderFiles, local_path
from cmi_lightning.data.images import Decoding, Note, UnreadableError, read_image
from cmi_lightning.data.noise_levels import sigmas_of
from cmi_lightning.errors import InputError, cause, printable

if TYPE_CHECKING:
    from cmi_lightning.data.measurements import MeasurementFolderData

ARRAYS = (".npy", ".pt", ".safetensors")


def read_array(path: Path, how: Decoding) -> Tensor:
    """Return the tensor of a ``.npy``, ``.pt`` or ``.safetensors`` file, or an image's pixels.

    Args:
        path: the file; one that can hold several tensors holds one, or one named "y".
        how: how an image's numbers become pixels in [−1, 1].

    Raises:
        UnreadableError: if it cannot be read, or is no array of finite real numbers.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAYS:
        return read_image(path, how)
    try:
        if suffix == ".npy":
            y = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            held = (
                load_file(path)
                if suffix == ".safetensors"
                else torch.load(path, "cpu", weights_only=True)
            )
            if isinstance(held, dict):
                held = held["y"] if "y" in held or len(held) != 1 else next(iter(held.values()))
            y = torch.as_tensor(held)
    except Exception as error:  # each parser raises its own kinds
        raise UnreadableError(
            f"Cannot read the array '{printable(path)}' ({cause(error)}); save one array or "
            "tensor, named y if there are others."
        ) from error
    if y.is_complex() or not bool(torch.isfinite(y).all()):
        raise UnreadableError(
            f"'{printable(path)}' must hold finite real numbers; save a complex array as two "
            "channels, its real and imaginary part."
        )
    return y.float()


class OwnMeasurements(FolderFiles):
    """Measurements as ``{"y": (*m), "id": "sub/name"}``, with ``"sigma"`` if levels are given."""

    key, option, arrays = "y", "data.measurements", ARRAYS
    clipped = ()

    def __init__(self, data: MeasurementFolderData) -> None:
        folder = local_path(data.measurements, self.option)
        levels = local_path(data.sigmas, "data.sigmas") if data.sigmas is not None else None
        apart = levels.resolve() if levels is not None and levels.is_dir() else None
        super().__init__(data, folder, apart)
        self.look()
        self.image_shapes = [] if data.shape is None else [data.shape]
        (first, shape), *others = self.survey.read.items()
        for name, other in others if data.shape else ():
            if other != shape:
                raise InputError(
                    f"data.measurements: '{first}' is of shape {shape} and '{name}' {other}, and "
                    f"all images are of data.shape={list(data.shape or ())}; restore each shape in "
                    "a run of its own."
                )
        self.maps: dict[str, Path] = {}
        self.sigmas: dict[str, float] = {}
        if apart is not None:
            self.maps = companions(self.survey.read, folder, apart, "data.sigmas")
        elif levels is not None:
            self.sigmas = sigmas_of(levels, self.survey.read, self.found, data.sigma_range)
        self.scale = 2.0 if data.sigma_range == "unit" else 1.0

    def _read(self, file: Path, note: Note = bool) -> Tensor:
        return read_array(file, self.how)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if (name := item["id"]) in self.maps:
            item["sigma"] = self.scale * self.read(self.maps[name])
        elif name in self.sigmas:
            item["sigma"] = torch.tensor(self.sigmas[name])
        return item
