"""Priors of one Gaussian: J is constant, and every answer is linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from cmi_lightning.checked import check_arguments
from cmi_lightning.errors import InputError
from cmi_lightning.exact.covariances import Covariance, StationaryCovariance
from cmi_lightning.exact.mixture import GaussianMixture
from cmi_lightning.schedule import Schedule, ScheduleName


class GaussianPrior(GaussianMixture):
    """p(x₀) = N(μ, C): the mixture of one component. J is constant, and CMI has no gradient.

    >>> from cmi_lightning.schedule import Level
    >>> prior = GaussianPrior(torch.zeros(2))
    >>> prior(torch.ones(1, 2), Level(alpha=1.0, sigma=1.0, time=0.0)).x0
    tensor([[0.5000, 0.5000]])

    Args:
        mean: μ (*shape).
        covariance: a variance ≥ 0, a number or (*shape), or a :class:`Covariance`.
        schedule: noise levels; default: the linear DDPM chain.

    Raises:
        InputError: if mean and covariance do not fit together.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Covariance | Tensor | float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        if isinstance(covariance, Tensor) and covariance.ndim:
            covariance = covariance[None]
        super().__init__(mean[None], covariance, None, schedule)


def power_law_prior(
    image_shape: list[int],
    exponent: float = 2.0,
    std: float = 0.3,
    mean: float = 0.0,
    schedule: Schedule | ScheduleName = "linear",
) -> GaussianPrior:
    """Return a stationary Gaussian texture: power ∝ 1/|f|^exponent, on a circular grid.

    The mean of an image, f = 0, has the power of the lowest frequency.

    Args:
        image_shape: (C, H, W); channels are independent.
        exponent: 0 is white; photographs have about 2.
        std: standard deviation of every pixel, > 0.
        mean: mean of every pixel.
        schedule: noise levels, or their name.

    Raises:
        InputError: for an impossible shape or standard deviation.

    Source: the spectrum of photographs, Field (1987).
    """
    check_arguments(power_law_prior, locals(), image_shape="[1, inf)", std="(0, inf)")
    if len(image_shape) != 3:
        raise InputError(f"image_shape must be (C, H, W), got {image_shape}.")
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in image_shape[1:])
    frequency = (rows[:, None] ** 2 + columns**2).sqrt()
    power = frequency.clamp_min(1 / max(image_shape[1:])) ** -exponent
    spectrum = (std**2 * power / power.mean()).expand(1, *image_shape).to(torch.get_default_dtype())
    grey = torch.full(tuple(image_shape), float(mean))
    return GaussianPrior(grey, StationaryCovariance(spectrum), Schedule.named(schedule))
