"""Given measurements, with no ground truth: degraded images, and what degraded them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmi_lightning.data.files import (
    Channels,
    check_alike,
    check_at_least_1,
    find_images,
    read_image,
)
from cmi_lightning.errors import InputError

Kind = Literal["denoise", "inpaint", "blur", "downsample"]
NEEDS = {"inpaint": "masks", "blur": "kernels", "downsample": "factor"}


class MeasurementFolder(Dataset):
    """Degraded images as ``{"y_image": (C, h, w) in [−1, 1], "id": "sub/name", …}``.

    "…" is what the kind asks for: ``"mask"`` (h, w) bool, ``"kernel"`` (kh, kw) or ``"factor"``.

    Args:
        data: the options, and what they may be: :class:`MeasurementFolderData`.

    Raises:
        InputError: see there; every file is read once here.
    """

    def __init__(self, data: MeasurementFolderData) -> None:
        self.kind, self.channels, self.factor = data.kind, data.channels, data.factor
        folder = Path(data.measurements).expanduser()
        files = list(find_images(folder, "data.measurements").items())[: data.limit]
        self.files = files
        shapes = {
            str(file): tuple(read_image(file, self.channels, "data.channels").shape)
            for _, file in files
        }
        check_alike(
            shapes,
            "data.measurements",
            "set data.channels to 1, 3 or 4",
            "restore each size in a run of its own",
        )
        channels, height, width = next(iter(shapes.values()))
        scale = self.factor or 1
        self.image_shape = (channels, height * scale, width * scale)
        self.extras: dict[str, Path] = {}
        names = [name for name, _ in files]
        if self.kind == "inpaint" and data.masks is not None:
            self.extras = _companions(names, data.masks, "data.masks", (".png",))
            for path in dict.fromkeys(self.extras.values()):
                _read_mask(path, (height, width))
        if self.kind == "blur" and data.kernels is not None:
            self.extras = _companions(names, data.kernels, "data.kernels", (".png", ".npy"))
            kernels = {
                str(path): (1, *read_kernel(path).shape)
                for path in dict.fromkeys(self.extras.values())
            }
            check_alike(kernels, "data.kernels", "", "pad the smaller ones with zeros")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
        name, file = self.files[index]
        y = read_image(file, self.channels, "data.channels")
        item: dict[str, Tensor | str | int] = {"y_image": y, "id": name}
        if self.kind == "inpaint":
            item["mask"] = _read_mask(self.extras[name], (y.shape[1], y.shape[2]))
        elif self.kind == "blur":
            item["kernel"] = read_kernel(self.extras[name])
        elif self.kind == "downsample" and self.factor is not None:
            item["factor"] = self.factor
        return item


def _companions(
    names: list[str], given: str, option: str, suffixes: tuple[str, ...]
) -> dict[str, Path]:
    """Return the mask or kernel of each image: one file for all, or the one of the same name."""
    source = Path(given).expanduser()
    if source.is_file():
        return dict.fromkeys(names, source)
    if not source.is_dir():
        raise InputError(
            f"{option}: there is no '{source}'; give a file for all images, or a folder with one "
            "for each."
        )
    result: dict[str, Path] = {}
    for name in names:
        candidates = [source / f"{name}{suffix}" for suffix in suffixes]
        present = [path for path in candidates if path.is_file()]
        if len(present) != 1:
            what = "nothing" if not present else "more than one file"
            raise InputError(
                f"{option}: the folder '{source}' has {what} for the measurement '{name}'; there "
                f"must be one '{name}{' or '.join(suffixes)}'."
            )
        result[name] = present[0]
    return result


def _read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """Return a mask (h, w): True where the gray value is above one half.

    Raises:
        InputError: if it is unreadable, of another size than the image, or black all over.
    """
    mask = read_image(path, 1, "data.masks")[0] > 0
    if tuple(mask.shape) != size:
        raise InputError(
            f"The mask '{path}' is {mask.shape[0]}×{mask.shape[1]} (height×width) and the "
            f"measurements are {size[0]}×{size[1]}; resize it without smoothing."
        )
    if not mask.any():
        raise InputError(f"The mask '{path}' has no white (known) pixel; is it inverted?")
    return mask


def read_kernel(path: Path) -> Tensor:
    """Return a blur kernel (kh, kw) of sum 1, float32, from a gray image or a 2-D ``.npy`` array.

    Raises:
        InputError: if it is unreadable, not 2-D, not finite, or its sum is not positive.
    """
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False).astype(np.float64)
        except Exception as error:
            raise InputError(
                f"Cannot read the kernel '{path}' ({type(error).__name__}); save a plain array "
                "with numpy.save."
            ) from error
        kernel = torch.from_numpy(array)
    else:
        kernel = (read_image(path, 1, "data.kernels")[0].double() + 1) / 2
    if kernel.ndim != 2 or not kernel.numel() or not kernel.isfinite().all() or kernel.sum() <= 0:
        raise InputError(
            f"The kernel '{path}' must be a 2-D array of finite numbers with a positive sum; it "
            f"has shape {tuple(kernel.shape)} and sum {float(kernel.sum()):g}."
        )
    return (kernel / kernel.sum()).float()


class MeasurementFolderData(L.LightningDataModule):
    """Prediction batches of given measurements, for which no ground truth is known.

    The noise level is the module's ``noise`` option, as for simulated measurements. Everything is
    checked at set-up, before any sampling.

    Args:
        measurements: folder of the degraded images, all of one size; subfolders are searched too.
        kind: what was done to them. "denoise": noise only. "inpaint": pixels are missing (whatever
            the image shows there is not used). "blur": correlation with a kernel, k_j x_{i+j−c}
            (as torch's conv2d and DPS have it), with reflected borders. "downsample": antialiased
            bicubic reduction by ``factor``.
        masks: for "inpaint": one PNG for all images, or a folder with a PNG of the same relative
            name for each; white is known, black is missing, cut at one half.
        kernels: for "blur": one gray PNG or 2-D ``.npy`` for all, or a folder with one of the same
            relative name for each, all of one size; divided by their sum.
        factor: for "downsample": ≥ 2; restored images are this much larger.
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps what the files have.
        limit: restore only the first ``limit`` images.
        batch_size: images per batch.
        num_workers: worker processes of the loader.

    Raises:
        InputError: at construction, if the kind's option is missing or another kind's is given; at
            set-up, for a missing or empty folder, an unreadable file, mixed sizes or channel
            counts, a missing mask or kernel, or one of the wrong size.
    """

    def __init__(
        self,
        measurements: str,
        kind: Kind = "denoise",
        masks: str | None = None,
        kernels: str | None = None,
        factor: int | None = None,
        channels: Channels | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.measurements, self.kind = measurements, kind
        self.masks, self.kernels, self.factor = masks, kernels, factor
        self.channels, self.limit = channels, limit
        self.batch_size, self.num_workers = batch_size, num_workers
        if kind not in get_args(Kind):
            raise InputError(f"data.kind must be one of {get_args(Kind)}, got '{kind}'.")
        needed = NEEDS.get(kind)
        for name, value in {"masks": masks, "kernels": kernels, "factor": factor}.items():
            if name == needed and value is None:
                raise InputError(f"data.kind={kind} needs data.{name}.")
            if name != needed and value is not None:
                raise InputError(
                    f"data.{name} is not used by data.kind={kind}; remove it or change the kind."
                )
        if factor is not None and factor < 2:
            raise InputError(f"data.factor must be at least 2, got {factor}.")

    def setup(self, stage: str) -> None:
        """Find and check the files."""
        check_at_least_1({"data.batch_size": self.batch_size, "data.limit": self.limit})
        self.images = MeasurementFolder(self)

    @property
    def given(self) -> str:
        """What was measured, for people."""
        needed = NEEDS.get(self.kind)
        option = f", {needed} {getattr(self, needed)}" if needed else ""
        return f"given measurements, {self.kind}{option}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every restored image, known after :meth:`setup`."""
        return self.images.image_shape

    def predict_dataloader(self) -> DataLoader:
        """The measurements to restore."""
        return DataLoader(self.images, batch_size=self.batch_size, num_workers=self.num_workers)
