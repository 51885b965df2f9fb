"""Given measurements, with no ground truth: degraded images, and what degraded them."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmi_lightning.data.base import RestorationData, measured
from cmi_lightning.data.files import (
    Channels,
    UnreadableError,
    check_alike,
    check_at_least_1,
    check_num_workers,
    check_pixels,
    find_images,
    local_path,
    read_all,
    read_image,
    report_skipped,
)
from cmi_lightning.data.noise_levels import Range, estimate_of, read_sigmas, report_estimates
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import LinearOperator
from cmi_lightning.paths import printable
from cmi_lightning.problem import Problem

Kind = Literal["denoise", "inpaint", "blur", "downsample"]
NEEDS = {"inpaint": "masks", "blur": "kernels", "downsample": "factor"}
ESTIMATE = "estimate"  # the value of data.sigmas that is no file
MAX_KERNEL = 2048  # pixels a side
MAX_GAIN = 100  # Σ|k| / Σk: how much more a kernel may magnify noise than a blur, which has 1


class MeasurementFolder(Dataset):
    """Degraded images as ``{"y_image": (C, h, w) in [−1, 1], "id": "sub/name", …}``.

    "…" is what the kind asks for: ``"mask"`` (h, w) bool, ``"kernel"`` (kh, kw) or ``"factor"``;
    and ``"sigma"``, the standard deviation of the noise on [−1, 1], if each image has its own.

    Args:
        data: the options, and what they may be: :class:`MeasurementFolderData`.

    Raises:
        InputError: see there; every file is read once here.
    """

    def __init__(self, data: MeasurementFolderData) -> None:
        self.kind, self.channels, self.factor = data.kind, data.channels, data.factor
        folder = local_path(data.measurements, "data.measurements")
        found = find_images(folder, "data.measurements")
        files = list(found.items())[: data.limit]
        option, given, suffixes = {
            "inpaint": ("data.masks", data.masks, (".png",)),
            "blur": ("data.kernels", data.kernels, (".png", ".npy")),
        }.get(self.kind, ("", None, ()))
        self.extras: dict[str, Path] = {}
        self.extra_sizes: dict[Path, tuple[int, ...]] = {}
        if given is not None:
            self.extras = _companions(dict(files), folder, given, option, suffixes)
            if local_path(given, option).is_file():  # it belongs to all: refused, not skipped
                self._check_extra(files[0][0])
        shapes, self.skipped = read_all(files, self._measure, data.strict, "data.measurements")
        self.files = [(name, found[name]) for name in shapes]
        check_alike(
            {printable(found[name]): shape for name, shape in shapes.items()},
            "data.measurements",
            "set data.channels to 1, 3 or 4",
            "restore each size in a run of its own",
        )
        channels, height, width = next(iter(shapes.values()))
        scale = self.factor or 1
        check_pixels(height * scale, width * scale, "data.factor", "choose a smaller one")
        self.image_shape = (channels, height * scale, width * scale)
        if self.kind == "inpaint":
            self._check_masks(height, width)
        elif self.extras:
            sizes = {printable(path): (1, *size) for path, size in self.extra_sizes.items()}
            check_alike(sizes, "data.kernels", "", "pad the smaller ones with zeros")
        self.sigmas, self.clipped = self._noise_levels(data, found)

    def _measure(self, name: str, file: Path) -> tuple[int, ...]:
        """Return the shape of a measurement, and note the one of what goes with it."""
        shape = tuple(read_image(file, self.channels, "data.channels").shape)
        if self.extras:
            self._check_extra(name)
        return shape

    def _check_extra(self, name: str) -> None:
        if (path := self.extras[name]) not in self.extra_sizes:
            self.extra_sizes[path] = tuple(self._read_extra(name).shape)

    def _check_masks(self, height: int, width: int) -> None:
        for path, size in self.extra_sizes.items():
            if size != (height, width):
                raise InputError(
                    f"The mask '{printable(path)}' is {size[0]}×{size[1]} (height×width) and the "
                    f"measurements are {height}×{width}; resize it without smoothing."
                )

    def _read_extra(self, name: str) -> Tensor:
        """Return the mask or the kernel of a measurement."""
        path = self.extras[name]
        return read_mask(path) if self.kind == "inpaint" else read_kernel(path)

    def _noise_levels(
        self, data: MeasurementFolderData, found: dict[str, Path]
    ) -> tuple[dict[str, float], list[str]]:
        """Return the standard deviation of each image, and the ids whose estimate is too low."""
        names = [name for name, _ in self.files]
        if data.sigmas is None:
            return {}, []
        if data.sigmas != ESTIMATE:
            path = local_path(data.sigmas, "data.sigmas")
            if not path.is_file():
                raise InputError(
                    f"data.sigmas: there is no file '{printable(path)}'; give a CSV file with the "
                    f"columns id,sigma, or the word {ESTIMATE}."
                )
            table = read_sigmas(path, found, data.sigma_range)
            missing = [name for name in names if name not in table]
            if missing:
                raise InputError(
                    f"data.sigmas: '{printable(path)}' has no sigma for {len(missing)} of "
                    f"{len(names)} measurements, such as '{missing[0]}'; add them."
                )
            return {name: table[name] for name in names}, []
        sigmas: dict[str, float] = {}
        clipped = []
        for name, file in self.files:
            y = read_image(file, self.channels, "data.channels")
            known = self._read_extra(name) if self.kind == "inpaint" else None
            sigmas[name], cut = estimate_of(name, y, known)
            clipped += [name] * cut
        return sigmas, clipped

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
        name, file = self.files[index]
        y = read_image(file, self.channels, "data.channels")
        item: dict[str, Tensor | str | int] = {"y_image": y, "id": name}
        if self.kind == "inpaint":
            item["mask"] = self._read_extra(name)
        elif self.kind == "blur":
            item["kernel"] = self._read_extra(name)
        elif self.kind == "downsample" and self.factor is not None:
            item["factor"] = self.factor
        if self.sigmas:
            item["sigma"] = torch.tensor(self.sigmas[name])
        return item


def _companions(
    files: dict[str, Path], folder: Path, given: str, option: str, suffixes: tuple[str, ...]
) -> dict[str, Path]:
    """Return the mask or kernel of each image: one file for all, or the one of the same name."""
    source = local_path(given, option)
    if source.is_file():
        return dict.fromkeys(files, source)
    if not source.is_dir():
        raise InputError(
            f"{option}: there is no '{printable(source)}'; give a file for all images, or a folder "
            "with one for each."
        )
    result: dict[str, Path] = {}
    for name, file in files.items():
        stem = file.relative_to(folder).with_suffix("")
        # The same letters may be written as other characters, as macOS does (NFD).
        forms = dict.fromkeys(
            (str(stem), *(unicodedata.normalize(form, str(stem)) for form in ("NFC", "NFD")))
        )
        candidates = [source / f"{form}{suffix}" for form in forms for suffix in suffixes]
        present = [path for path in candidates if path.is_file()]
        if len(present) != 1:
            what = "nothing" if not present else "more than one file"
            raise InputError(
                f"{option}: the folder '{printable(source)}' has {what} for the measurement "
                f"'{name}'; there must be one '{name}{' or '.join(suffixes)}'."
            )
        result[name] = present[0]
    return result


def read_mask(path: Path) -> Tensor:
    """Return a mask (h, w): True where the gray value is above one half.

    Raises:
        InputError: if it is unreadable, or black all over.
    """
    mask = read_image(path, 1, "data.masks")[0] > 0
    if not mask.any():
        raise InputError(
            f"The mask '{printable(path)}' has no white (known) pixel; is it inverted?"
        )
    return mask


def read_kernel(path: Path) -> Tensor:
    """Return a blur kernel (kh, kw) of sum 1, float32, from a gray image or a 2-D ``.npy`` array.

    Raises:
        InputError: if it is unreadable, not 2-D, larger than 2048 pixels a side, not finite, or its
            sum is not positive, or below 1 % of the sum of absolute values.
    """
    if path.suffix.lower() == ".npy":
        array = _load_array(path)
    else:
        array = (read_image(path, 1, "data.kernels")[0].double().numpy() + 1) / 2
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
    return torch.from_numpy((array / total).astype(np.float32))


def _load_array(path: Path) -> np.ndarray:
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
            if mapped.ndim != 2 or max(mapped.shape) > MAX_KERNEL:
                raise ValueError(f"shape {mapped.shape}")
            return np.array(mapped, np.float64)
    except Exception as error:  # NumPy's parser raises all kinds
        reason = printable(" ".join(str(error).split())[:200])
        raise UnreadableError(
            f"Cannot read the kernel '{printable(path)}' ({type(error).__name__}: {reason}); save "
            f"one 2-D array of real numbers, at most {MAX_KERNEL} a side, with numpy.save."
        ) from error


class MeasurementFolderData(RestorationData):
    """Prediction batches of given measurements, for which no ground truth is known.

    The noise level is the module's ``noise`` option, as for simulated measurements, unless
    ``sigmas`` gives each image its own. Everything is checked at set-up, before any sampling.

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
        sigmas: a CSV file with the columns id,sigma, one line for each image; or "estimate", by
            wavelets (:func:`cmi_lightning.data.noise_levels.estimate_sigma`, which says how far to
            trust it; missing pixels have no part in it); None: the module's ``noise`` for all.
        sigma_range: the image range that the CSV's numbers refer to: "signed" is [−1, 1], "unit"
            is [0, 1].
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps what the files have.
        limit: restore only the first ``limit`` images.
        batch_size: images per batch.
        num_workers: worker processes of the loader.
        strict: refuse a folder with a file that cannot be decoded; else such files, and images
            whose own mask or kernel is one, are reported, left out and listed in ``skipped``,
            {file: reason}.

    Raises:
        InputError: at construction, if the kind's option is missing or another kind's is given; at
            set-up, for a missing or empty folder, one with no readable image (with ``strict``: with
            an unreadable one), mixed sizes or channel counts, a missing mask or kernel, or one of
            the wrong size, and a CSV file with a missing, unknown, repeated or senseless entry.
    """

    def __init__(
        self,
        measurements: str,
        kind: Kind = "denoise",
        masks: str | None = None,
        kernels: str | None = None,
        factor: int | None = None,
        sigmas: str | None = None,
        sigma_range: Range = "signed",
        channels: Channels | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.measurements, self.kind = measurements, kind
        self.masks, self.kernels, self.factor = masks, kernels, factor
        self.channels, self.limit = channels, limit
        self.batch_size, self.num_workers = batch_size, num_workers
        self.sigmas, self.sigma_range, self.strict = sigmas, sigma_range, strict
        self.estimates: dict[str, float] = {}
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
        check_num_workers(self.num_workers)
        self.images = MeasurementFolder(self)
        if self.images.skipped != self.skipped:  # set-up runs twice: before and in the trainer
            report_skipped(self.images.skipped, len(self.images))
        self.skipped = self.images.skipped
        if self.sigmas == ESTIMATE and self.images.sigmas != self.estimates:
            report_estimates(self.images.sigmas, self.images.clipped)
            self.estimates = self.images.sigmas

    def problem(
        self, batch: dict[str, Any], operator: LinearOperator, std: float, noise: SampleNoise
    ) -> tuple[Problem, Tensor]:
        """Return the problem of a batch; ``operator`` has no part in it."""
        return measured(batch, self.kind, std, noise)

    @property
    def given(self) -> str:
        """What was measured, for people."""
        needed = NEEDS.get(self.kind)
        option = f", {needed} {printable(getattr(self, needed))}" if needed else ""
        return f"given measurements, {self.kind}{option}"

    @property
    def given_noise(self) -> str | None:
        """The noise of the images, for people; None where it is the module's."""
        if self.sigmas is None:
            return None
        source = (
            "estimated by wavelets" if self.sigmas == ESTIMATE else f"from {printable(self.sigmas)}"
        )
        values = sorted(self.images.sigmas.values())
        return f"σ of each image, {source}: {values[0]:.4g} to {values[-1]:.4g} on [−1, 1]"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every restored image, known after :meth:`setup`."""
        return self.images.image_shape

    def predict_dataloader(self) -> DataLoader:
        """The measurements to restore."""
        return DataLoader(self.images, batch_size=self.batch_size, num_workers=self.num_workers)
