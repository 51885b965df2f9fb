"""What a prior must provide: x̂₀(x_t), differentiable as often as the guidance asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmi_lightning.schedule import Level, Schedule


class Prediction(NamedTuple):
    """What a denoiser says of x_t.

    Attributes:
        x0: x̂₀ = E[x₀ | x_t], (B, *), in the dtype of x_t.
        variance_fraction: where between the smallest (0) and the largest (1) posterior variance a
            network with learned variance puts each pixel, (B, *); None for other networks.
    """

    x0: Tensor
    variance_fraction: Tensor | None = None


class Denoiser(nn.Module, ABC):
    """A prior p(x₀), given by its posterior mean at every noise level.

    Attributes:
        schedule: the noise levels that the denoiser knows.
        image_shape: (C, H, W) of its images, with None where any size will do.
        value_range: smallest and largest value of a clean image, or None when unbounded. Solvers
            clamp x̂₀ to it; derivatives are always taken of the unclamped x̂₀.
        learns_variance: predictions carry a variance fraction.
        derivatives: how often x̂₀ can be differentiated.
        size_multiple: both sides of an image must be multiples of this.
    """

    schedule: Schedule
    image_shape: tuple[int | None, ...] | None = None
    value_range: tuple[float, float] | None = None
    learns_variance: bool = False
    derivatives: int = 2
    size_multiple: int = 1

    @abstractmethod
    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return x̂₀ of x_t (B, *) = α x₀ + σ ε at ``level``."""


class Autocast(Denoiser):
    """Another denoiser, its network run in low precision; x̂₀ comes back in the dtype of x_t.

    Args:
        denoiser: the denoiser to run.
        dtype: what autocast lowers to.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype
        self.schedule, self.image_shape = denoiser.schedule, denoiser.image_shape
        self.value_range, self.learns_variance = denoiser.value_range, denoiser.learns_variance
        self.derivatives, self.size_multiple = denoiser.derivatives, denoiser.size_multiple

    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return the denoiser's prediction of x_t (B, *)."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            prediction = self.denoiser(x, level)
        fraction = prediction.variance_fraction
        return Prediction(
            prediction.x0.to(x.dtype), None if fraction is None else fraction.to(x.dtype)
        )
