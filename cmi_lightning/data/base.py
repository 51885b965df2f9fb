"""What all prediction data have in common: each batch knows its problem."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    Convolution,
    Downsample,
    Identity,
    Operator,
    PixelMask,
)
from cmi_lightning.problem import Problem


class RestorationData(L.LightningDataModule):
    """Prediction batches whose problem, y = A x + n, this class knows.

    A batch is a dict with ``"id"``, a list of names. Here it holds clean images,
    ``"x"`` (B, C, H, W) in [−1, 1], which the sampler's operator measures. Data that were measured
    elsewhere override :meth:`problem` and name themselves in ``given``.

    Attributes:
        skipped: {file: reason} of the files that could not be read.

    Example:
        >>> import torch
        >>> from cmi_lightning.noise import SampleNoise
        >>> from cmi_lightning.operators import BoxMask
        >>> batch = {"x": torch.zeros(2, 1, 8, 8), "id": ["a", "b"]}
        >>> noise = SampleNoise(0, batch["id"])
        >>> problem, like = RestorationData().problem(batch, BoxMask(4, 2), 0.05, noise)
        >>> tuple(like.shape)
        (2, 1, 8, 8)
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}

    @property
    def given(self) -> str | None:
        """The given measurements, for people; None where they are simulated."""
        return None

    @property
    def given_noise(self) -> str | None:
        """The given measurements' noise, for people; None where it is the sampler's."""
        return None

    def problem(
        self, batch: dict[str, Any], operator: Operator, std: float, noise: SampleNoise
    ) -> tuple[Problem, Tensor]:
        """Return a batch's problem, and a tensor of the shape of its images (B, C, H, W).

        Args:
            batch: one batch of the loader.
            operator: the sampler's A.
            std: the sampler's noise level, on [−1, 1].
            noise: the random numbers of the batch's samples.
        """
        return simulated(batch, operator, std, noise)


class LoaderData(RestorationData):
    """The batches of a loader that came without a data module: their keys say what they hold."""

    def problem(
        self, batch: dict[str, Any], operator: Operator, std: float, noise: SampleNoise
    ) -> tuple[Problem, Tensor]:
        """Return the problem of simulated measurements (``"x"``) or of given ones."""
        if "x" in batch:
            return simulated(batch, operator, std, noise)
        kinds = {"mask": "inpaint", "kernel": "blur", "factor": "downsample"}
        kind = next((kind for key, kind in kinds.items() if key in batch), "denoise")
        return measured(batch, kind, std, noise)


def simulated(
    batch: dict[str, Any], operator: Operator, std: float, noise: SampleNoise
) -> tuple[Problem, Tensor]:
    """Return the problem of clean images ``"x"``, measured by ``operator``, and the images."""
    x: Tensor = batch["x"]
    return Problem.simulate(x, operator, std, noise), x


def measured(
    batch: dict[str, Any], kind: str, std: float, noise: SampleNoise
) -> tuple[Problem, Tensor]:
    """Return the problem of given measurements ``"y_image"``, and zeros of the images' shape.

    Args:
        batch: also has ``"mask"`` (inpaint), ``"kernel"`` (blur) or ``"factor"`` (downsample), and
            may have ``"sigma"`` (B,), a noise level for each image.
        kind: how they were measured, see :class:`cmi_lightning.data.MeasurementFolderData`.
        std: the noise level where the batch has none.
        noise: the random numbers of the batch's samples.
    """
    y: Tensor = batch["y_image"]
    size, channels, height, width = y.shape
    scale = int(torch.as_tensor(batch["factor"]).flatten()[0]) if kind == "downsample" else 1
    shape = (channels, height * scale, width * scale)
    like = y.new_zeros(size, *shape)
    operator: Operator = Identity()
    if kind == "inpaint":
        operator = PixelMask.from_mask(batch["mask"], like)
        y = operator(y)
    elif kind == "blur":
        operator = Convolution(batch["kernel"].to(y)).bind(shape, noise, like)
    elif scale > 1:
        operator = Downsample(scale).bind(shape, noise, like)
    return Problem(y, operator, batch["sigma"].to(y) if "sigma" in batch else std), like
