"""Operators that act on rows and columns apart, such as Gaussian blur."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.linalg import per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator

Padding = Literal["reflect", "circular"]


def boundary(
    size: int,
    before: int,
    after: int,
    padding: Literal["reflect", "circular", "symmetric"],
    device: torch.device | None = None,
) -> Tensor:
    """Return the pixel that stands at each of the positions −before, …, size − 1 + after.

    "reflect" mirrors at the outermost pixels (numpy.pad's "reflect"), "symmetric" at their outer
    edges, "circular" wraps round. Any amount of padding works, from a single pixel on.
    """
    position = torch.arange(-before, size + after, device=device)
    if padding == "circular":
        return position % size
    if padding == "reflect":
        period = max(2 * size - 2, 1)
        return torch.minimum(position % period, -position % period)
    return torch.minimum(position % (2 * size), (-1 - position) % (2 * size))


def reciprocal(value: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    """Return 1/value where value > threshold, else 0."""
    keep = value > threshold
    return torch.where(keep, 1 / torch.where(keep, value, 1), 0)


def constant_per_channel(shift: Tensor) -> bool:
    """Whether a shift, broadcastable to y (B, C, H, W), has one value for each channel."""
    return all(n == 1 for n in shift.shape[-2:])


@dataclass(frozen=True, eq=False)
class Separable(LinearOperator):
    """Y = A_h X A_wᵀ for every channel X of an image, that is A = A_h ⊗ A_w.

    The singular values of A are the products s_i s_j of those of the two matrices, so that
    (AAᵀ + λ)⁻¹ and A⁺ are exact and cheap. A⁺ leaves out s_i s_j < rcond · max s_i s_j: noise of
    standard deviation σ in y is magnified to at most σ / (rcond · max s_i s_j) in A⁺y.

    >>> A = Separable(torch.ones(1, 2), torch.eye(2))
    >>> A(torch.ones(1, 1, 2, 2))
    tensor([[[[2., 2.]]]])

    Args:
        height: A_h (h, H).
        width: A_w (w, W).
        rcond: relative size of the smallest singular value that A⁺ inverts, in [0, 1).
    """

    height: Tensor
    width: Tensor
    rcond: float = number(0.1, "[0, 1)")

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        size = (self.height.shape[1], self.width.shape[1])
        if size != tuple(image_shape[1:]):
            raise InputError(
                f"The operator's matrices are made for images of {size[0]}×{size[1]}, not of "
                f"{image_shape[1]}×{image_shape[2]}; resize the images."
            )
        bound = type(self)(self.height.to(like), self.width.to(like), self.rcond)
        object.__setattr__(bound, "image_shape", image_shape)
        return bound

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U_h, U_w, the singular values (h, w) of A, V_h, V_w; V has as many columns as U.

        Singular values below rounding error are zero.
        """
        parts = []
        for matrix in (self.height, self.width):
            rows, columns = matrix.shape
            # Double precision on the CPU: small matrices, and the same result for every device.
            u, s, vh = torch.linalg.svd(matrix.cpu().double())
            s = torch.cat([s, s.new_zeros(max(rows - len(s), 0))])
            v = torch.cat([vh.T, vh.new_zeros(columns, max(rows - columns, 0))], 1)[:, :rows]
            parts.append((u, s, v))
        (uh, sh, vh), (uw, sw, vw) = parts
        values = sh[:, None] * sw
        values[values < torch.finfo(self.height.dtype).eps * values.max()] = 0
        uh, uw, values, vh, vw = (t.to(self.height) for t in (uh, uw, values, vh, vw))
        return uh, uw, values, vh, vw

    def forward(self, x: Tensor) -> Tensor:
        return self.height @ x @ self.width.T

    def adjoint(self, y: Tensor) -> Tensor:
        return self.height.T @ y @ self.width

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (A Aᵀ + diag(shift))⁻¹ y.

        Closed form for a shift per sample (or per channel), conjugate gradients for a shift per
        measurement. Without shift, directions in which A is zero are left out.
        """
        added = per_sample(shift, y)
        if not constant_per_channel(added):
            return super().solve(y, added)
        uh, uw, values, _, _ = self._svd
        return uh @ ((uh.T @ y @ uw) * reciprocal(values**2 + added)) @ uw.T

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        _, _, values, vh, vw = self._svd
        unseen = f(values.new_zeros(()))
        return unseen * x + vh @ ((vh.T @ x @ vw) * (f(values) - unseen)) @ vw.T

    def pinv(self, y: Tensor) -> Tensor:
        uh, uw, values, vh, vw = self._svd
        inverse = reciprocal(values, self.rcond * values.max())
        return vh @ ((uh.T @ y @ uw) * inverse) @ vw.T


@dataclass(frozen=True)
class GaussianBlur(LinearOperator):
    """Blur by the kernel k_j ∝ exp(−j² / 2 sd²), |j| ≤ r, Σ k_j = 1, along both axes.

    r = min(⌊4 sd + ½⌋, ⌊(kernel_size − 1)/2⌋). Measurements have the size of the images, which may
    be smaller than the kernel. It becomes a :class:`Separable`.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, GaussianBlur(5, sd=1.0), 0.05, noise).y.shape
    torch.Size([2, 1, 8, 8])

    Args:
        kernel_size: the most taps of the kernel, at least 1.
        sd: standard deviation in pixels, above 0.
        padding: what lies outside the image: its mirror image without the outermost pixel
            ("reflect", as in the DPS code) or its other end ("circular").
        rcond: A⁺ leaves out singular values below rcond times the largest, which is about 1. So
            A⁺y magnifies noise at most 1/rcond times.

    Source: the Gaussian deblurring of DPS (Chung et al., 2023); kernel as scipy's gaussian_filter.
    """

    kernel_size: int = number(61, "[1, inf)")
    sd: float = number(5.0, "(0, inf)")
    padding: Padding = "reflect"
    rcond: float = number(0.1, "[0, 1)")

    def kernel(self) -> Tensor:
        """Return the kernel of one axis (2r + 1,), float64."""
        radius = min(int(4 * self.sd + 0.5), (self.kernel_size - 1) // 2)
        taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
        return torch.softmax(-(taps**2) / (2 * self.sd**2), 0)

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Separable:
        height, width = (_blur_matrix(self.kernel(), n, self.padding) for n in image_shape[1:])
        return Separable(height, width, self.rcond).bind(image_shape, noise, like)


def _blur_matrix(kernel: Tensor, size: int, padding: Padding) -> Tensor:
    radius = len(kernel) // 2
    column = boundary(size, radius, radius, padding).unfold(0, len(kernel), 1)
    matrix = kernel.new_zeros(size, size)
    return matrix.scatter_add(1, column, kernel.expand(size, -1))
