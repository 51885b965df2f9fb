"""The inverse problem y = A(x₀) + n of one batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from cmi_lightning.checked import check, check_value
from cmi_lightning.errors import InputError, counted
from cmi_lightning.linalg import dot, norm, per_sample
from cmi_lightning.measurement_noise import MeasurementNoise
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import Operator

Noise = float | Tensor | MeasurementNoise


@dataclass(frozen=True, eq=False)
class Problem:
    """y = A(x₀) + n with n ~ N(0, diag(std²)), for a batch of images.

    >>> from cmi_lightning.operators import BoxMask
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> problem = Problem.simulate(x, BoxMask(4, margin=1), 0.05, noise)
    >>> problem.y.shape
    torch.Size([2, 1, 48])

    Attributes:
        y: measurements (B, *m), in units of images in [−1, 1].
        operator: A; the sampler binds it to the images where it was not.
        noise_std: standard deviation of n: a number, one per sample (B,), or one per measurement,
            broadcastable to y.
    """

    y: Tensor
    operator: Operator
    noise_std: float | Tensor

    def __post_init__(self) -> None:
        check(self, noise_std="[0, inf)")

    @classmethod
    def simulate(cls, x: Tensor, operator: Operator, noise_std: Noise, noise: SampleNoise) -> Self:
        """Measure clean images x (B, C, H, W) in [−1, 1].

        The problem's operator is the given one made concrete for these images: masks and kernels
        are drawn, matrices take the images' dtype and device. ``noise_std`` is a standard deviation
        as :class:`Problem` has it, or a model of the noise, which then gives it from y.

        Raises:
            InputError: if the operator cannot act on such images.
        """
        check_value("noise_std", noise_std, Noise, "[0, inf)")
        bound = operator.bind(tuple(x.shape[1:]), noise, x)
        check_rows(bound, x, noise)
        clean = bound(x)

        def normal(stream: str) -> Tensor:
            return bound.sample_noise(lambda like: noise.normal(stream, 0, like), clean)

        if isinstance(noise_std, MeasurementNoise):
            y = bound.zero_padding(noise_std.sample(clean, normal))
        else:
            y = clean + per_sample(noise_std, clean) * normal("measurement")
        return cls(y, bound, std_of(noise_std, y))

    def bind(self, noise: SampleNoise, like: Tensor) -> Self:
        """Return the problem with its operator made concrete for images like ``like``.

        An operator that has been is kept.

        Raises:
            InputError: if the operator cannot act on such images.
        """
        if self.operator.image_shape:
            return self
        bound = self.operator.bind(tuple(like.shape[1:]), noise, like)
        check_rows(bound, like, noise)
        return replace(self, operator=bound)

    @cached_property
    def std(self) -> Tensor:
        """The noise standard deviation, broadcastable to y."""
        return per_sample(self.noise_std, self.y)

    @cached_property
    def relative_std(self) -> Tensor | None:
        """``std`` over its root mean square per sample, (B, *m); None where it is one number."""
        std = self.std
        if std.numel() <= len(self.y):
            return None
        kept = self.operator.zero_padding(torch.ones_like(self.y))
        mean = dot(std**2 * kept, kept) / dot(kept, kept)
        return std / per_sample(mean.clamp_min(torch.finfo(std.dtype).tiny).sqrt(), self.y)

    @cached_property
    def noise_norm(self) -> Tensor:
        """√(Σ std²) (B,), the residual that noise alone leaves: σ√m for m measured entries."""
        return norm(self.operator.zero_padding(self.std.expand_as(self.y)))

    def prox(self, x: Tensor, variance: float) -> Tensor:
        """Return the mean of N(x₀; x, v)·p(y | x₀) (B, *): x + Aᵀ(A Aᵀ + Σ_n/v)⁻¹(y − A x).

        A nonlinear A enters by its derivative at x.

        Args:
            x: centre (B, *).
            variance: v > 0.
        """
        A = self.operator.linearize(x)
        return x + A.adjoint(A.solve(self.y - self.operator(x), self.std**2 / variance))

    def draw(self, x: Tensor, variance: float, z: Tensor, n: Tensor) -> Tensor:
        """Return an exact sample of N(x₀; x, v)·p(y | x₀) (B, *), by one solve.

        It is the :meth:`prox` of perturbed data: of x + √v z, with y + σ n for y.

        Args:
            x: centre (B, *).
            variance: v > 0.
            z: standard normal, like x.
            n: standard normal, like y, and 0 at padding.
        """
        perturbed = replace(self, y=self.y + self.std * n)
        return perturbed.prox(x + variance**0.5 * z, variance)

    @cached_property
    def noisy(self) -> bool:
        """Whether every measurement carries noise."""
        return bool(torch.all(self.std > 0))


def std_of(noise: Noise, y: Tensor) -> float | Tensor:
    """Return the standard deviation of measurements y (B, *m) that a noise level or model gives."""
    return noise.std(y) if isinstance(noise, MeasurementNoise) else noise


def check_rows(operator: Operator, like: Tensor, noise: SampleNoise) -> None:
    """Apply a bound operator to random images, and again after changing the first of them.

    Raises:
        InputError: if the result is not finite, has not one row an image, or lets a row depend on
            another image.
    """
    name, x = type(operator).__name__, noise.normal("check", 0, like).clamp(-1, 1)
    with torch.no_grad():
        y = operator(x)
        if not isinstance(y, Tensor) or y.ndim < 1 or len(y) != len(x):
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"{name} maps {counted(len(x), 'image')} to {shape}; its result must have one row "
                f"an image."
            )
        if not bool(torch.isfinite(y).all()):
            raise InputError(
                f"{name} gives values that are no numbers for images in [−1, 1]; mend its forward."
            )
        if len(x) == 1:
            return
        # Another mean and another spread: a change of sign would leave a batch's variance.
        others = operator(torch.cat([0.5 * x[:1] + 0.4, x[1:]]))[1:]
    if not torch.allclose(others, y[1:], rtol=1e-3, atol=1e-4 * float(y.abs().max())):
        raise InputError(
            f"{name} mixes the images of a batch: each row of its result must depend on its own "
            "image alone; mend its forward."
        )
