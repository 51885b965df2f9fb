"""An operator given by its matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.linalg import per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.operators.separable import reciprocal


@dataclass(frozen=True, eq=False)
class Dense(LinearOperator):
    """y = M x on flattened images: (B, *image_shape) → (B, m).

    >>> A = Dense(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
    >>> A(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 6.]])

    Args:
        matrix: M (m, n).
        image_shape: shape of one image, of n numbers; default: a vector (n,).

    Raises:
        InputError: if the matrix is not one, or does not fit the images.
    """

    matrix: Tensor
    image_shape: tuple[int, ...] = number((), "[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.matrix.ndim != 2:
            raise InputError(f"Dense.matrix must be (m, n), got {tuple(self.matrix.shape)}.")
        shape = torch.Size(self.image_shape or self.matrix.shape[1:])
        if shape.numel() != self.matrix.shape[1]:
            raise InputError(
                f"Dense.matrix takes {self.matrix.shape[1]} numbers and images of {tuple(shape)} "
                f"have {shape.numel()}; resize the images."
            )
        object.__setattr__(self, "image_shape", tuple(shape))

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        return type(self)(self.matrix.to(like), image_shape)

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, m), the singular values (m,) and Vᵀ (m or n, n); values below rounding are 0."""
        m, n = self.matrix.shape
        # Double precision on the CPU: the same result for every device.
        u, s, vh = torch.linalg.svd(self.matrix.cpu().double(), full_matrices=m > n)
        s = torch.where(s > torch.finfo(self.matrix.dtype).eps * s.max(), s, 0)
        s = torch.cat([s, s.new_zeros(m - len(s))])
        return u.to(self.matrix), s.to(self.matrix), vh.to(self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.mT

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).reshape(len(y), *self.image_shape)

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (M Mᵀ + diag(shift))⁻¹ y; without shift, directions that M loses are left out.

        Closed form for a shift per sample, conjugate gradients for a shift per measurement.
        """
        added = per_sample(shift, y)
        if added.ndim and added.shape[-1] > 1:
            return super().solve(y, added)
        u, s, _ = self._svd
        return (y @ u * reciprocal(s**2 + added)) @ u.mT

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        _, s, vh = self._svd
        rank = min(self.matrix.shape)
        unseen = f(s.new_zeros(()))
        seen = (x.flatten(1) @ vh[:rank].mT).reshape(len(x), *(1,) * (x.ndim - 2), rank)
        seen = (seen * (f(s[:rank]) - unseen)).flatten(1)
        return unseen * x + (seen @ vh[:rank]).reshape(x.shape)

    def pinv(self, y: Tensor) -> Tensor:
        u, s, vh = self._svd
        rank = min(self.matrix.shape)
        x = (y @ u * reciprocal(s))[:, :rank] @ vh[:rank]
        return x.reshape(len(y), *self.image_shape)
