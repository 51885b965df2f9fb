"""What all prediction data have in common: each batch knows its problem."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Convolution, Downsample, Identity, Operator, PixelMask
from cmi_lightning.problem import Noise, Problem, std_of

KINDS = {"mask": "inpaint", "kernel": "blur", "factor": "downsample"}  # by what a batch holds


class RestorationData(L.LightningDataModule):
    """Prediction batches whose problem, y = A x + n, this class knows.

    A batch is a dict with ``"id"``, a list of names. Here it holds clean images,
    ``"x"`` (B, C, H, W) in [−1, 1], which the sampler's operator measures. Data that were measured
    elsewhere override :meth:`problem` and name themselves in ``given``.

    Attributes:
        skipped: {file: reason} of the files that could not be read.
        takes_operator: the measurements are those of the sampler's operator.

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

    takes_operator = True

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
        self, batch: dict[str, Any], operator: Operator, std: Noise, noise: SampleNoise
    ) -> tuple[Problem, Tensor]:
        """Return a batch's problem, and a tensor of the shape of its images (B, C, H, W).

        Args:
            batch: one batch of the loader.
            operator: the sampler's A.
            std: the sampler's noise: a level on [−1, 1], or a model of it.
            noise: the random numbers of the batch's samples.
        """
        x: Tensor = batch["x"]
        return Problem.simulate(x, operator, std, noise), x


class LoaderData(RestorationData):
    """The batches of a loader that came without a data module: their keys say what they hold."""

    def problem(
        self, batch: dict[str, Any], operator: Operator, std: Noise, noise: SampleNoise
    ) -> tuple[Problem, Tensor]:
        """Return the problem of ``"y"``, of simulated (``"x"``) or of given measurements."""
        if "y" in batch:
            return own(batch, operator, std, noise)
        if "x" in batch:
            return super().problem(batch, operator, std, noise)
        kind = next((kind for key, kind in KINDS.items() if key in batch), "denoise")
        return measured(batch, kind, std, noise)


def own(
    batch: dict[str, Any], operator: Operator, std: Noise, noise: SampleNoise
) -> tuple[Problem, Tensor]:
    """Return the problem of measurements ``"y"`` (B, *m) of ``operator``, and the images' shape.

    Args:
        batch: may have the truth ``"x"``, the images' shape ``"image_shape"`` (C, H, W), and
            ``"sigma"``, a noise level for each image (B,) or measurement (B, *m).
        operator: A.
        std: the noise where the batch has no level.
        noise: the random numbers of the batch's samples.

    Raises:
        InputError: if the batch says itself how it was measured, the images' shape is not known, or
            y is of another shape than A's measurements.
    """
    y: Tensor = batch["y"]
    name = type(operator).__name__
    if said := [key for key in KINDS if key in batch]:
        raise InputError(
            f'The batch holds "y", which {name} is taken to have measured, and "{said[0]}", which '
            f'says otherwise; remove "{said[0]}", or give "y_image" and no operator.'
        )
    shape = next(
        (tuple(int(n) for n in s) for s in (batch.get("image_shape"), operator.image_shape) if s),
        tuple(batch["x"].shape[1:]) if "x" in batch else tuple(y.shape[1:]),
    )
    wanted = f'give its shape as data.shape=[C,H,W], or a batch\'s "image_shape"; tried {shape}'
    if len(shape) != 3:
        raise InputError(f"The images behind the measurements of {name} are not known: {wanted}.")
    like = y.new_zeros(len(y), *shape)
    bound = operator.bind(shape, noise, like)
    with torch.no_grad():
        made = tuple(bound(like).shape)
    if made != tuple(y.shape):
        raise InputError(
            f"The measurements are of shape {tuple(y.shape[1:])} and {name} makes {made[1:]} of an "
            f"image: {wanted}."
        )
    return Problem(y, bound, batch["sigma"].to(y) if "sigma" in batch else std_of(std, y)), like


def measured(
    batch: dict[str, Any], kind: str, std: Noise, noise: SampleNoise
) -> tuple[Problem, Tensor]:
    """Return the problem of given measurements ``"y_image"``, and zeros of the images' shape.

    Args:
        batch: also has ``"mask"`` (inpaint), ``"kernel"`` (blur) or ``"factor"`` (downsample), and
            may have ``"sigma"``, a noise level for each image (B,) or pixel (B, C, h, w).
        kind: how they were measured, see :class:`cmi_lightning.data.MeasurementFolderData`.
        std: the noise where the batch has no level.
        noise: the random numbers of the batch's samples.
    """
    y: Tensor = batch["y_image"]
    size, channels, height, width = y.shape
    scale = int(torch.as_tensor(batch["factor"]).flatten()[0]) if kind == "downsample" else 1
    shape = (channels, height * scale, width * scale)
    like = y.new_zeros(size, *shape)
    sigma = batch["sigma"].to(y) if "sigma" in batch else None
    operator: Operator = Identity()
    if kind == "inpaint":
        operator = PixelMask.from_mask(batch["mask"], like)
        y = operator(y)
        if sigma is not None and sigma.ndim > 1:
            sigma = operator(sigma.expand(like.shape))
    elif kind == "blur":
        operator = Convolution(batch["kernel"].to(y)).bind(shape, noise, like)
    elif scale > 1:
        operator = Downsample(scale).bind(shape, noise, like)
    return Problem(y, operator, std_of(std, y) if sigma is None else sigma), like
