"""Operators of super-resolution: bicubic reduction by several conventions, and block means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.operators.separable import Separable, boundary

Convention = Literal["matlab", "pillow", "opencv", "aligned"]


@dataclass(frozen=True)
class Downsample(LinearOperator):
    """Bicubic downsampling by one of four conventions: (H, W) → (H/f, W/f).

    Along each axis y_i = Σ_j w_ij x_j with w_ij ∝ h((u_i − j)/r) and Σ_j w_ij = 1, where h is Keys'
    cubic kernel of parameter a.

    | convention | whose | u_i | r | a | outside the image |
    |---|---|---|---|---|---|
    | "matlab" | MATLAB's imresize | (i + ½) f − ½ | f | −½ | mirrored at its edges |
    | "pillow" | Pillow; torch with antialias | (i + ½) f − ½ | f | −½ | left out |
    | "opencv" | OpenCV; torch without | (i + ½) f − ½ | 1 | −¾ | the outermost pixel |
    | "aligned" | torch's align_corners | i (n − 1)/(n/f − 1) | 1 | −¾ | the outermost pixel |

    r = f is antialiased; r = 1 picks four pixels of each axis and leaves the others out. It becomes
    a :class:`Separable`. A is well conditioned, so that A⁺ is exact.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, Downsample(4), 0.05, noise).y.shape
    torch.Size([2, 1, 2, 2])

    Args:
        factor: f, at least 1.
        convention: which rule made the small images.

    Raises:
        InputError: when it meets images, if the factor does not divide both sides of them.

    Source: Keys (1981); the super-resolution of DPS (Chung et al., 2023) is "matlab".
    """

    factor: int = number(4, "[1, inf)")
    convention: Convention = "matlab"

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Separable:
        _check_factor(self, self.factor, image_shape)
        height, width = (_bicubic_matrix(n, self.factor, self.convention) for n in image_shape[1:])
        return Separable(height, width, rcond=1e-3).bind(image_shape, noise, like)


@dataclass(frozen=True)
class AveragePool(LinearOperator):
    """The mean of each f × f block: (H, W) → (H/f, W/f). It becomes a :class:`Separable`.

    AAᵀ = 1/f², so A⁺ repeats each pixel f × f times.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.ones(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, AveragePool(4), 0.0, noise).y[0, 0]
    tensor([[1., 1.],
            [1., 1.]])

    Args:
        factor: f, at least 1.

    Raises:
        InputError: when it meets images, if the factor does not divide both sides of them.

    Source: the super-resolution of DDRM (Kawar et al., 2022) and DDNM.
    """

    factor: int = number(4, "[1, inf)")

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Separable:
        _check_factor(self, self.factor, image_shape)
        f = self.factor
        height, width = (
            torch.eye(n // f, dtype=torch.float64).repeat_interleave(f, 1) / f
            for n in image_shape[1:]
        )
        return Separable(height, width, rcond=0.0).bind(image_shape, noise, like)


def _check_factor(operator: LinearOperator, factor: int, image_shape: tuple[int, ...]) -> None:
    """Raise an InputError unless the factor divides both sides of the images."""
    name = type(operator).__name__
    if any(n % factor for n in image_shape[1:]):
        raise InputError(
            f"{name} with factor {factor} cannot act on images of {image_shape[1]}×"
            f"{image_shape[2]}: the factor must divide both sides; resize or crop the images, "
            f"or set another {name}.factor."
        )


def _bicubic_matrix(size: int, factor: int, convention: Convention) -> Tensor:
    """Return one axis of the reduction, (size/factor, size), float64."""
    stretch, a = (factor, -0.5) if convention in ("matlab", "pillow") else (1, -0.75)
    reach = 2 * stretch  # of the kernel, on either side
    index = torch.arange(size // factor, dtype=torch.float64)
    centre = (index + 0.5) * factor - 0.5
    if convention == "aligned":
        centre = index * ((size - 1) / max(len(index) - 1, 1))
    position = torch.arange(-reach, size + reach, dtype=torch.float64)
    distance = ((centre[:, None] - position) / stretch).abs()
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    weight = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))
    if convention == "pillow":
        weight[:, (position < 0) | (position >= size)] = 0
    weight = weight / weight.sum(1, keepdim=True)
    column = boundary(size, reach, reach, "symmetric")
    if convention != "matlab":
        column = position.long().clamp(0, size - 1)
    return weight.new_zeros(len(centre), size).scatter_add(1, column.expand_as(weight), weight)
