"""Given measurements, with no ground truth: degraded images, and what degraded them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from cmi_lightning.checked import check
from cmi_lightning.data.base import measured, own
from cmi_lightning.data.batches import FolderData
from cmi_lightning.data.extras import (
    Convention,
    companions,
    looks_inverted,
    read_kernel,
    read_mask,
)
from cmi_lightning.data.files import (
    FolderFiles,
    Kept,
    Shape,
    check_channels,
    check_pixels,
    local_path,
)
from cmi_lightning.data.images import Channels, Note
from cmi_lightning.data.noise_levels import Range, estimate_of, report_estimates, sigmas_of
from cmi_lightning.data.own import OwnMeasurements
from cmi_lightning.errors import InputError, printable
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Operator
from cmi_lightning.problem import Noise, Problem

Kind = Literal["denoise", "inpaint", "blur", "downsample", "own"]
NEEDS = {"inpaint": "masks", "blur": "kernels", "downsample": "factor"}
ESTIMATE = "estimate"  # the value of data.sigmas that is no file


class MeasurementFolder(FolderFiles):
    """Degraded images as ``{"y_image": (C, h, w) in [−1, 1], "id": "sub/name", …}``.

    "…" is what the kind asks for: ``"mask"`` (h, w) bool, ``"kernel"`` (kh, kw) or ``"factor"``;
    and ``"sigma"``, the standard deviation of the noise on [−1, 1], if each image has its own.
    """

    key, option = "y_image", "data.measurements"

    def __init__(self, data: MeasurementFolderData) -> None:
        self.kind, self.factor = data.kind, data.factor
        folder = local_path(data.measurements, self.option)
        source, option = None, f"data.{NEEDS.get(self.kind)}"
        if given := data.masks or data.kernels:
            source = local_path(given, option)
        inside = source is not None and folder.resolve() in source.resolve().parents
        super().__init__(data, folder, source.resolve() if source and inside else None)
        self.extras: dict[str, Path] = {}
        self.kernel_sizes: dict[str, tuple[int, ...]] = {}
        self.missing: list[float] = []
        kernel = partial(read_kernel, convention=data.kernel_convention)
        self.read_extra = Kept(read_mask if self.kind == "inpaint" else kernel)
        if source is not None:
            self.extras = companions(self.wanted, folder, source, option)
            if source.is_file():  # it belongs to all: refused, not skipped
                self._extra(next(iter(self.wanted)))
        self.look()
        read, scale = self.survey.read, self.factor or 1
        check_channels({printable(self.found[name]): s for name, s in read.items()}, self.option)
        self.shapes = [(*shape, *self.kernel_sizes.get(name, ())) for name, shape in read.items()]
        self.image_shapes = [(c, h * scale, w * scale) for c, h, w in dict.fromkeys(read.values())]
        for _, height, width in self.image_shapes:
            check_pixels(height, width, "data.factor", "choose a smaller one")
        self.sigmas, self.clipped = self._noise_levels(data)

    def _measure(self, name: str, file: Path, note: Note) -> Shape:
        """Return the shape of a measurement, and look at what goes with it."""
        y = self.read(file, note=note)
        channels, height, width = y.shape
        if self.kind == "blur":
            self.kernel_sizes[name] = tuple(self._extra(name).shape)
        elif self.kind == "inpaint":
            known = self._extra(name, (height, width))
            self.missing.append(1 - float(known.float().mean()))
            if looks_inverted(y, known):
                note("have known pixels of one value and missing ones that differ: inverted masks?")
        return channels, height, width

    def _extra(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Return the mask, which must be of the measurement's size, or the kernel."""
        extra = self.read_extra(self.extras[name], **({"size": size} if size else {}))
        return extra if size in (None, extra.shape) else read_mask(self.extras[name], size)

    def _noise_levels(self, data: MeasurementFolderData) -> tuple[dict[str, float], list[str]]:
        """Return the standard deviation of each image, and the ids whose estimate is too low."""
        if data.sigmas is None:
            return {}, []
        if data.sigmas != ESTIMATE:
            path = local_path(data.sigmas, "data.sigmas")
            return sigmas_of(path, self.survey.read, self.found, data.sigma_range), []
        sigmas: dict[str, float] = {}
        clipped = []
        for name, file in self.files:
            known = self._extra(name) if self.kind == "inpaint" else None
            sigmas[name], cut = estimate_of(name, self.read(file), known)
            clipped += [name] * cut
        return sigmas, clipped

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        name = item["id"]
        if self.kind in ("inpaint", "blur"):
            item["mask" if self.kind == "inpaint" else "kernel"] = self._extra(name)
        elif self.kind == "downsample" and self.factor is not None:
            item["factor"] = self.factor
        if self.sigmas:
            item["sigma"] = torch.tensor(self.sigmas[name])
        return item


class MeasurementFolderData(FolderData):
    """Prediction batches of given measurements, for which no ground truth is known.

    The noise level is the module's ``noise`` option, as for simulated measurements, unless
    ``sigmas`` gives each image its own. Everything is checked at set-up, before any sampling.

    Args:
        measurements: folder of the degraded images; subfolders are searched too.
        kind: what was done to them. "denoise": noise only. "inpaint": pixels are missing (whatever
            the image shows there is not used). "blur": correlation with a kernel, k_j x_{i+j−c}
            (as torch's conv2d and DPS have it), with reflected borders. "downsample": antialiased
            bicubic reduction by ``factor``. "own": what the sampler's ``operator`` does; files may
            then be arrays too, ``.npy``, ``.pt`` or ``.safetensors``, of any shape.
        masks: for "inpaint": one image or 2-D ``.npy`` for all, or a folder with one of the same
            relative name for each; white is known, black is missing
            (:func:`cmi_lightning.data.extras.read_mask` has the rules). Files within
            ``measurements`` are not measurements then; so with ``kernels``.
        kernels: for "blur": one gray image or 2-D ``.npy`` for all, or a folder with one of the
            same relative name for each; divided by their sum.
        factor: for "downsample": ≥ 2; restored images are this much larger.
        sigmas: a CSV file with the columns id,sigma, one line for each image; or "estimate", by
            wavelets (:func:`cmi_lightning.data.noise_levels.estimate_sigma`, which says how far to
            trust it; missing pixels have no part in it); None: the module's ``noise`` for all.
            For "own" a folder also serves, of arrays with a level for each measurement.
        sigma_range: the image range that the CSV's numbers refer to: "signed" is [−1, 1], "unit"
            is [0, 1].
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps what the files have.
        limit: restore only the first ``limit`` images.
        batch_size: images per batch; "auto" lets ``predict`` choose by measuring.
        num_workers: worker processes of the loader.
        strict: refuse a folder with a file that cannot be decoded; else such files, and images
            whose own mask or kernel is one, are reported, left out and listed in ``skipped``,
            {file: reason}.
        background: colour behind transparent pixels, by name or as "rgb(255, 0, 0)".
        white_level: the number that is white in files of 16 or 32 bits, such as 4095; None: 65535.
        range: the numbers that are black and white in files of floating-point numbers.
        shape: for "own": (C, H, W) of the images, where it is not that of the measurements.
        kernel_convention: "correlation", or "convolution" for kernels that are mirrored in it,
            k_j x_{i−j+c}, as in scipy.ndimage.convolve.

    Raises:
        InputError: at construction, if the kind's option is missing or another kind's is given; at
            set-up, for a missing or empty folder, one with no readable image (with ``strict``: with
            an unreadable one), mixed channel counts, a missing mask or kernel, or one of the wrong
            size, and a CSV file with a missing, unknown, repeated or senseless entry.

    Example:
        >>> from cmi_lightning.paths import SHIPPED
        >>> folder = str(SHIPPED["fashion-mnist-test"])
        >>> data = MeasurementFolderData(folder, "downsample", factor=2, limit=3)
        >>> data.setup("predict")
        >>> data.image_shape
        (1, 64, 64)
        >>> sorted(data.images[0])
        ['factor', 'id', 'y_image']
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
        batch_size: int | Literal["auto"] = 16,
        num_workers: int = 0,
        strict: bool = False,
        background: str = "white",
        white_level: int | None = None,
        range: tuple[float, float] | None = None,
        kernel_convention: Convention = "correlation",
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.measurements, self.kind = measurements, kind
        self.masks, self.kernels, self.factor = masks, kernels, factor
        self.channels, self.limit = channels, limit
        self.batch_size, self.num_workers = batch_size, num_workers
        self.sigmas, self.sigma_range, self.strict = sigmas, sigma_range, strict
        self.background, self.white_level, self.range = background, white_level, range
        self.kernel_convention, self.shape = kernel_convention, shape
        self.takes_operator = kind == "own"
        self.estimates: dict[str, float] = {}
        names = ("kind", "kernel_convention")
        check(self, *names, label="data", factor="[2, inf)", shape="[1, inf)")
        mirrored = None if kernel_convention == "correlation" else kernel_convention
        options: dict[str, Any] = {"masks": masks, "kernels": kernels, "factor": factor}
        options |= {"shape": shape, "kernel_convention": mirrored}
        if (needed := NEEDS.get(kind)) and options[needed] is None:
            raise InputError(f"data.kind={kind} needs data.{needed}.")
        used = (needed, {"own": "shape", "blur": "kernel_convention"}.get(kind))
        for name in [n for n, value in options.items() if value is not None and n not in used]:
            raise InputError(
                f"data.{name} is not used by data.kind={kind}; remove it or change the kind."
            )
        if sigmas == ESTIMATE and kind == "own":
            raise InputError(
                "data.sigmas=estimate is for images; give a CSV file, or set model.noise."
            )

    def found(self) -> OwnMeasurements | MeasurementFolder:
        """Search and read the folder."""
        check(self, label="data", limit="[1, inf)")
        return OwnMeasurements(self) if self.kind == "own" else MeasurementFolder(self)

    def setup(self, stage: str) -> None:
        """Find and check the files, and report the levels that were estimated."""
        super().setup(stage)
        if self.sigmas == ESTIMATE and self.images.sigmas != self.estimates:
            rank_zero_only(report_estimates)(self.images.sigmas, self.images.clipped)
            self.estimates = self.images.sigmas

    def problem(
        self, batch: dict[str, Any], operator: Operator, std: Noise, noise: SampleNoise
    ) -> tuple[Problem, Tensor]:
        """Return the problem of given measurements, the sampler's operator's if of kind "own"."""
        if self.kind == "own":
            return own({"image_shape": self.shape, **batch}, operator, std, noise)
        return measured(batch, self.kind, std, noise)

    @property
    def given(self) -> str:
        """What was measured, for people, with the share of pixels that is missing."""
        needed = NEEDS.get(self.kind)
        option = f", {needed} {printable(getattr(self, needed))}" if needed else ""
        if self.kind == "inpaint" and self.images is not None:
            shares = [f"{share:.3g} %" for share in sorted({100 * s for s in self.images.missing})]
            option += f" ({' to '.join(dict.fromkeys((shares[0], shares[-1])))} missing)"
        elif self.kind == "blur":
            option += f" ({self.kernel_convention})"
        return f"given measurements, {self.kind}{option}"

    @property
    def given_noise(self) -> str | None:
        """The noise of the images, for people; None where it is the module's."""
        if self.sigmas is None:
            return None
        source = (
            "estimated by wavelets" if self.sigmas == ESTIMATE else f"from {printable(self.sigmas)}"
        )
        if not self.images.sigmas:
            return f"σ of each measurement, {source}"
        values = sorted(self.images.sigmas.values())
        return f"σ of each image, {source}: {values[0]:.4g} to {values[-1]:.4g} on [−1, 1]"
