"""The inverse problem y = A x₀ + n of one batch, and its noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.linalg import norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator


@dataclass(frozen=True)
class GaussianNoise:
    """Measurement noise of standard deviation ``sigma``, with the range it is meant in.

    The same 0.05 means two noises in the literature: on images in [−1, 1] ("signed", as DPS and DSG
    use it) or on images in [0, 1] ("unit", as DDRM and ΠGDM do), which is twice as much.

    >>> GaussianNoise(0.05, "unit").std
    0.1

    Args:
        sigma: standard deviation, ≥ 0.
        range: the image range that ``sigma`` refers to.

    Raises:
        InputError: if ``sigma`` is negative.
    """

    sigma: float = 0.05
    range: Literal["signed", "unit"] = "signed"

    def __post_init__(self) -> None:
        if self.sigma < 0:
            raise InputError(f"noise.sigma must be at least 0, got {self.sigma}.")

    @property
    def std(self) -> float:
        """The standard deviation on images in [−1, 1]."""
        return self.sigma * (2.0 if self.range == "unit" else 1.0)


@dataclass(frozen=True, eq=False)
class Problem:
    """y = A x₀ + n with n ~ N(0, diag(std²)), for a batch of images.

    >>> from cmi_lightning.operators import BoxMask
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> problem = Problem.simulate(x, BoxMask(4, margin=1), 0.05, noise)
    >>> problem.y.shape
    torch.Size([2, 1, 48])

    Attributes:
        y: measurements (B, *m), in units of images in [−1, 1].
        operator: A, bound to these images.
        noise_std: standard deviation of n: a number, one per sample (B,), or one per measurement,
            broadcastable to y.
    """

    y: Tensor
    operator: LinearOperator
    noise_std: float | Tensor

    @classmethod
    def simulate(
        cls, x: Tensor, operator: LinearOperator, noise_std: float | Tensor, noise: SampleNoise
    ) -> Self:
        """Measure clean images x (B, C, H, W) in [−1, 1].

        The problem's operator is the given one made concrete for these images: masks and kernels
        are drawn, matrices take the images' dtype and device.

        Raises:
            InputError: if the operator cannot act on such images.
        """
        bound = operator.bind(tuple(x.shape[1:]), noise, x)
        clean = bound(x)
        n = bound.sample_noise(lambda like: noise.normal("measurement", 0, like), clean)
        return cls(clean + per_sample(noise_std, clean) * n, bound, noise_std)

    @property
    def std(self) -> Tensor:
        """The noise standard deviation, broadcastable to y."""
        return per_sample(self.noise_std, self.y)

    @property
    def noise_norm(self) -> Tensor:
        """√(Σ std²) (B,), the residual that noise alone leaves: σ√m for m measured entries."""
        return norm(self.operator.zero_padding(self.std.expand_as(self.y)))

    @property
    def noisy(self) -> bool:
        """Whether every measurement carries noise."""
        return bool(torch.all(self.std > 0))
