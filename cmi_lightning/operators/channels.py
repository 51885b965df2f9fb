"""Operators that mix the channels of each pixel: gray from colour, and a camera's mosaic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.linalg import per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.operators.separable import reciprocal

LUMINANCE = (0.299, 0.587, 0.114)  # of R, G, B: ITU-R BT.601


@dataclass(frozen=True, eq=False)
class ChannelMix(LinearOperator):
    """y[b, k] = Σ_c weights[k, c] ⊙ x[b, c], with weights for all pixels or for each.

    Every channel has a part in one y_k at most, so that AAᵀ is diagonal: solve and A⁺ are exact.

    >>> A = ChannelMix(torch.tensor([[0.5, 0.5]]).reshape(1, 2, 1, 1))
    >>> A(torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)).item()
    2.0

    Args:
        weights: (K, C, 1, 1) or (K, C, H, W).

    Raises:
        InputError: if a channel of a pixel has a part in two measurements.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(((self.weights != 0).sum(0) > 1).any()):
            raise InputError("ChannelMix.weights: a channel may have a part in one y_k only.")

    def bind(
        self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        made = self.weights.shape[1:]
        if made[0] != image_shape[0] or tuple(made[1:]) not in ((1, 1), tuple(image_shape[1:])):
            raise InputError(
                f"The channel weights are made for images {tuple(made)}, not {tuple(image_shape)}; "
                "convert the images."
            )
        bound = ChannelMix(self.weights.to(like))
        object.__setattr__(bound, "image_shape", image_shape)
        return bound

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights * x[:, None]).sum(2)

    def adjoint(self, y: Tensor) -> Tensor:
        return (self.weights * y[:, :, None]).sum(1)

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return y / (Σ_c weights² + shift), 0 where that is 0."""
        return y * reciprocal((self.weights**2).sum(1) + per_sample(shift, y))


@dataclass(frozen=True)
class Colorize(LinearOperator):
    """The gray picture of a colour image (1, H, W); an alpha channel is kept beside it.

    It becomes a :class:`ChannelMix`. Gray images stay as they are.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.ones(1, 3, 2, 2), SampleNoise(0, ["a"])
    >>> Problem.simulate(x, Colorize(), 0.0, noise).y.shape
    torch.Size([1, 1, 2, 2])

    Args:
        weights: "mean" of R, G and B (as DDRM and DDNM), or "luminance", 0.299 R + 0.587 G +
            0.114 B (ITU-R BT.601, as Pillow's and JPEG's gray).
    """

    weights: Literal["mean", "luminance"] = "mean"

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> ChannelMix:
        gray = torch.full((3,), 1 / 3) if self.weights == "mean" else torch.tensor(LUMINANCE)
        return _mix(gray[:, None, None], self, image_shape, like)


@dataclass(frozen=True)
class Demosaic(LinearOperator):
    """The mosaic (1, H, W) behind a Bayer colour filter: each pixel measures one of R, G and B.

    It becomes a :class:`ChannelMix`. Gray images stay as they are, an alpha channel is kept beside.

    >>> from cmi_lightning import Problem
    >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    >>> Problem.simulate(x, Demosaic("RGGB"), 0.0, SampleNoise(0, ["a"])).y.flatten()
    tensor([1., 2., 2., 3.])

    Args:
        pattern: colours of the first two rows and columns, read in rows.

    Source: Bayer (1976), US patent 3,971,065.
    """

    pattern: Literal["RGGB", "BGGR", "GRBG", "GBRG"] = "RGGB"

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> ChannelMix:
        height, width = image_shape[1:]
        row, column = torch.arange(height) % 2, torch.arange(width) % 2
        place = 2 * row[:, None] + column  # of each pixel within the pattern
        colour = torch.tensor(["RGB".index(c) for c in self.pattern])[place]
        mosaic = torch.nn.functional.one_hot(colour, 3).permute(2, 0, 1).float()
        return _mix(mosaic, self, image_shape, like)


def _mix(
    colour: Tensor, operator: LinearOperator, image_shape: tuple[int, ...], like: Tensor
) -> ChannelMix:
    """Return the sum of R, G and B by weights (3, H or 1, W or 1); gray and alpha as they are."""
    channels = image_shape[0]
    if channels not in (1, 3, 4):
        raise InputError(
            f"{type(operator).__name__} takes images of 1, 3 or 4 channels, not {channels}; "
            "convert the images."
        )
    weights = colour[None] if channels == 3 else torch.ones(1, 1, 1, 1)
    if channels == 4:
        weights = torch.zeros(2, 4, *colour.shape[1:])
        weights[0, :3], weights[1, 3] = colour, 1
    bound = ChannelMix(weights.to(like))
    object.__setattr__(bound, "image_shape", tuple(image_shape))
    return bound
