"""The noise of measurements: how it is drawn, and its standard deviation given the measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmi_lightning.checked import Checked, number

Draw = Callable[[str], Tensor]


class MeasurementNoise(Checked, ABC):
    """What a measurement y is to A(x₀): a draw, and the standard deviation that guidances take.

    >>> class Salt(MeasurementNoise):
    ...     def sample(self, clean, normal):
    ...         return clean + 0.1 * normal("salt").sign()
    ...     def std(self, y):
    ...         return 0.1
    >>> Salt().sample(torch.zeros(1, 2), lambda stream: torch.ones(1, 2))
    tensor([[0.1000, 0.1000]])
    """

    @abstractmethod
    def sample(self, clean: Tensor, normal: Draw) -> Tensor:
        """Return y (B, *m).

        Args:
            clean: A(x₀) (B, *m).
            normal: standard normal numbers shaped like ``clean``, by the name of their stream.
        """

    @abstractmethod
    def std(self, y: Tensor) -> float | Tensor:
        """Return the standard deviation of y given A(x₀), estimated from y: a number or (B, *m)."""

    @property
    def present(self) -> bool:
        """Whether every measurement carries noise."""
        return True


@dataclass(frozen=True)
class GaussianNoise(MeasurementNoise):
    """y = A(x₀) + σ n, n ~ N(0, 1), with the range that σ is meant in.

    The same 0.05 means two noises in the literature: on images in [−1, 1] ("signed", as DPS and DSG
    use it) or on images in [0, 1] ("unit", as DDRM and ΠGDM do), which is twice as much.

    >>> GaussianNoise(0.05, "unit").level
    0.1

    Args:
        sigma: standard deviation, ≥ 0.
        range: the image range that ``sigma`` refers to.
    """

    sigma: float = number(0.05, "[0, inf)")
    range: Literal["signed", "unit"] = "signed"

    @property
    def level(self) -> float:
        """The standard deviation on images in [−1, 1]."""
        return self.sigma * (2.0 if self.range == "unit" else 1.0)

    @property
    def present(self) -> bool:
        """Whether σ > 0."""
        return self.sigma > 0

    def sample(self, clean: Tensor, normal: Draw) -> Tensor:
        return clean + self.level * normal("measurement")

    def std(self, y: Tensor) -> float:
        return self.level


@dataclass(frozen=True)
class PoissonNoise(MeasurementNoise):
    """Photon counts: (y + 1)/2 ~ Poisson(peak · u)/peak, u = (A(x₀) + 1)/2 clipped from below at 0.

    Var[y | x₀] = 4 u/peak. Guidances take the estimate std(y)² = 2 max(y + 1, 2/peak)/peak, in
    which a pixel without a count has one. y is in units of images in [−1, 1], so A must
    measure light: masks, blurs and reductions do.

    >>> noise = PoissonNoise(peak=100)
    >>> noise.sample(torch.zeros(1, 1), lambda stream: torch.zeros(1, 1))  # 50 counts of 100
    tensor([[0.]])
    >>> noise.std(torch.tensor([[0.0, -1.0]]))
    tensor([[0.1414, 0.0200]])

    Args:
        peak: expected counts of a white pixel, > 0. DPS's ``rate`` is peak/255.

    Source: Chung et al. (2023), section 4, whose code clips y at white; the variance is a count's.
    """

    peak: float = number(100.0, "(0, inf)")

    def sample(self, clean: Tensor, normal: Draw) -> Tensor:
        counts = poisson(self.peak * (clean + 1) / 2, normal("photons"))
        return 2 * counts / self.peak - 1

    def std(self, y: Tensor) -> Tensor:
        return (2 * (y + 1).clamp_min(2 / self.peak) / self.peak).sqrt()


@dataclass(frozen=True)
class PoissonGaussianNoise(PoissonNoise):
    """Photon counts, as :class:`PoissonNoise`, and a camera's read-out noise, N(0, σ²), on top.

    >>> PoissonGaussianNoise(100, 0.1).std(torch.tensor([[0.0]]))
    tensor([[0.1732]])

    Args:
        peak: expected counts of a white pixel, > 0.
        sigma: standard deviation of the read-out noise, ≥ 0.
        range: the image range that ``sigma`` refers to.
    """

    sigma: float = number(0.05, "[0, inf)")
    range: Literal["signed", "unit"] = "signed"

    def sample(self, clean: Tensor, normal: Draw) -> Tensor:
        return GaussianNoise(self.sigma, self.range).sample(super().sample(clean, normal), normal)

    def std(self, y: Tensor) -> Tensor:
        return (super().std(y) ** 2 + GaussianNoise(self.sigma, self.range).level ** 2).sqrt()


def poisson(rate: Tensor, normal: Tensor) -> Tensor:
    """Return Poisson counts of these rates (negative ones count as 0) from standard normal numbers.

    The count is the quantile of Φ(z): the smallest k with P(N ≤ k) ≥ Φ(z). So counts belong to the
    sample as its normal numbers do. P(N ≤ k) is the incomplete gamma function Q(k + 1, rate).

    >>> poisson(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([9.0, 0.0, 2.0]))
    tensor([0., 4., 8.])
    """
    rates, z = rate.detach().cpu().double().clamp_min(0), normal.cpu().double()
    wanted = torch.special.ndtr(z)
    low = torch.full_like(rates, -1)  # P(N ≤ low) < wanted ≤ P(N ≤ high)
    high = (rates + 12 * rates.sqrt() + 60).ceil()
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor()
        enough = torch.special.gammaincc(middle + 1, rates) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.to(rate)
