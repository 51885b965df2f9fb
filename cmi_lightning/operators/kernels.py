"""Blur by kernels of your own: one for all images, one for each, or a grid across the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.operators.blur import Convolution
from cmi_lightning.operators.separable import Padding


class VaryingBlur(LinearOperator):
    """y = Σ_g w_g ⊙ (k_g ∗ x): a blur that changes across the image, from a grid of kernels.

    The weights interpolate linearly between the centres of the grid's tiles, and sum to 1 at each
    pixel. A⁺ is damped as that of a :class:`Convolution` with reflected borders is.

    >>> kernels = torch.ones(2, 2, 1, 1)
    >>> A = VaryingBlur(kernels, (1, 4, 4), "reflect", 0.1)
    >>> torch.allclose(A(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    True

    Args:
        kernels: (rows, columns, kh, kw), correlated with the image.
        image_shape: (C, H, W).
        padding: as in :class:`Convolution`.
        rcond: A⁺ = Aᵀ (AAᵀ + (rcond · max_g Σ|k_g|)²)⁻¹.
    """

    def __init__(
        self, kernels: Tensor, image_shape: tuple[int, ...], padding: Padding, rcond: float
    ) -> None:
        self.image_shape, self.rcond = image_shape, rcond
        self.gain = float(kernels.abs().sum((2, 3)).max())
        rows, columns = (
            _hats(n, side).to(kernels)
            for n, side in zip(kernels.shape[:2], image_shape[1:], strict=True)
        )
        self.weights = (rows[:, None, :, None] * columns[:, None, :]).flatten(0, 1)  # (G, H, W)
        self.blurs = [Convolution(k[None], padding) for k in kernels.flatten(0, 1)]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for weight, blur in zip(self.weights, self.blurs, strict=True):
            y = y + weight * blur(x)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        x = torch.zeros_like(y)
        for weight, blur in zip(self.weights, self.blurs, strict=True):
            x = x + blur.adjoint(weight * y)
        return x

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(self.solve(y, (self.rcond * self.gain) ** 2))


def _hats(count: int, size: int) -> Tensor:
    """Return ``count`` linear hat functions over ``size`` pixels, of sum 1, (count, size)."""
    place = ((torch.arange(size, dtype=torch.float64) + 0.5) * count / size - 0.5).clamp(
        0, count - 1
    )
    return (1 - (place - torch.arange(count)[:, None]).abs()).clamp(min=0)


@dataclass(frozen=True, eq=False)
class GivenKernel(LinearOperator):
    """Blur by kernels that you have. It becomes a :class:`Convolution` or :class:`VaryingBlur`.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.ones(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, GivenKernel(torch.ones(3, 3) / 9), 0.0, noise).y.shape
    torch.Size([2, 1, 8, 8])

    Args:
        kernels: (kh, kw) for all images, (B, kh, kw) with one for each, or (rows, columns, kh, kw)
            for a grid of tiles, between which the blur changes gradually. Or a gray image or
            ``.npy`` file of one kernel, which is divided by its sum. They are correlated with the
            image: k_j meets x_{i + j − c}.
        padding: "reflect" or "circular"; see :class:`Convolution`.
        rcond: A⁺ is truncated or damped below; see :class:`Convolution`.

    Raises:
        InputError: when it meets images, if the file cannot be read or the numbers differ.
    """

    kernels: str | Tensor
    padding: Padding = "reflect"
    rcond: float = number(0.1, "[0, 1)")

    def bind(
        self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor
    ) -> LinearOperator:
        if isinstance(self.kernels, (str, Path)):
            from cmi_lightning.data.extras import read_kernel

            kernels = read_kernel(Path(self.kernels).expanduser())
        else:
            kernels = torch.as_tensor(self.kernels)
        if kernels.ndim not in (2, 3, 4) or 0 in kernels.shape:
            raise InputError(
                "GivenKernel.kernels must be (kh, kw), (images, kh, kw) or (rows, columns, kh, "
                f"kw), got {tuple(kernels.shape)}."
            )
        if kernels.ndim == 4:
            return VaryingBlur(kernels.to(like), tuple(image_shape), self.padding, self.rcond)
        kernels = kernels[None] if kernels.ndim == 2 else kernels
        return Convolution(kernels, self.padding, self.rcond).bind(image_shape, noise, like)
