"""Covariances as eigenvalues in an orthonormal basis, in which every formula is elementwise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from cmi_lightning.checked import check_value
from cmi_lightning.errors import InputError
from cmi_lightning.linalg import per_sample


class Covariance(nn.Module, ABC):
    """C_k = U_k diag(λ_k) U_kᵀ for each component k of a mixture, or one for all of them.

    Any f(C) = U f(λ) Uᵀ is then a function of the eigenvalues between two changes of basis. Zero
    eigenvalues are allowed. Points are flattened, (…, K, n), or (…, 1, n) where one serves all.

    >>> DiagonalCovariance(torch.tensor([[1.0, 4.0]])).matrix()
    tensor([[[1., 0.],
             [0., 4.]]])

    Attributes:
        values: λ ≥ 0, (K, n), or (1, n) if all components share one covariance.
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        if values.numel() == 0 or not bool(torch.isfinite(values).all() & (values >= 0).all()):
            raise InputError(
                f"A covariance needs finite variances of at least 0, got {values.min():g}."
                if values.numel()
                else "A covariance needs at least one variance, got none."
            )
        self.register_buffer("values", values)

    @abstractmethod
    def to_basis(self, x: Tensor) -> Tensor:
        """Return Uᵀ x, (…, K, n)."""

    @abstractmethod
    def from_basis(self, z: Tensor) -> Tensor:
        """Return U z, (…, K, n)."""

    def matrix(self, values: Tensor | None = None) -> Tensor:
        """Return U diag(values) Uᵀ, dense (K, n, n); C itself by default."""
        values = self.values if values is None else values
        identity = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        rows = self.from_basis(values * self.to_basis(identity[:, None]))
        return rows.movedim(0, 1)

    def variances(self) -> Tensor:
        """Return the diagonals of C, (K, n)."""
        return self.matrix().diagonal(dim1=1, dim2=2)

    def options(self) -> dict[str, Tensor]:
        """Return what :meth:`restored` needs, by name."""
        return {"values": self.values}

    @classmethod
    @abstractmethod
    def restored(cls, options: dict[str, Tensor]) -> Self:
        """Return the covariance that gave ``options``."""


class DiagonalCovariance(Covariance):
    """C_k = diag(v_k): the basis is the pixels' own.

    >>> DiagonalCovariance(torch.tensor([[1.0, 4.0]])).variances()
    tensor([[1., 4.]])

    Args:
        variances: v ≥ 0, (K, *shape), or (1, *shape) for one covariance of all components.

    Raises:
        InputError: if a variance is negative or not finite.
    """

    def __init__(self, variances: Tensor) -> None:
        super().__init__(variances.flatten(1))

    def to_basis(self, x: Tensor) -> Tensor:
        return x

    def from_basis(self, z: Tensor) -> Tensor:
        return z

    def variances(self) -> Tensor:
        return self.values

    @classmethod
    def restored(cls, options: dict[str, Tensor]) -> Self:
        return cls(options["values"])


class DenseCovariance(Covariance):
    """Any C_k, by its eigendecomposition, which is made once, in float64.

    >>> DenseCovariance(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).values
    tensor([[1., 3.]])

    Args:
        matrix: C, symmetric and positive semidefinite: (K, n, n), or (n, n) for one covariance of
            all components; n counts the flattened image.
        floor: eigenvalues below it count as 0; they must not be below its negative. Default:
            n·ε times the largest eigenvalue of all, ε of the matrix's dtype.

    Raises:
        InputError: if a matrix is not square, symmetric, finite and positive semidefinite.
    """

    vectors: Tensor

    def __init__(self, matrix: Tensor, floor: float | None = None) -> None:
        check_value("floor", floor, float | None, "[0, inf)")
        matrix = matrix[None] if matrix.ndim == 2 else matrix
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise InputError(
                f"A dense covariance is (n, n) or (K, n, n), got {tuple(matrix.shape)}; n counts "
                "the flattened image."
            )
        wide = matrix.cpu().double()  # not every accelerator has float64
        largest = float(wide.abs().max())
        rounding = matrix.shape[1] * torch.finfo(matrix.dtype).eps * largest
        if not math.isfinite(largest) or float((wide - wide.mT).abs().max()) > rounding:
            raise InputError("A dense covariance must be finite and symmetric; use ½(C + Cᵀ).")
        values, vectors = torch.linalg.eigh(0.5 * (wide + wide.mT))
        if floor is None:
            floor = matrix.shape[1] * torch.finfo(matrix.dtype).eps * float(values.max())
        if float(values.min()) < -floor:
            raise InputError(
                "A dense covariance must be positive semidefinite, got an eigenvalue of "
                f"{float(values.min()):g}."
            )
        super().__init__(torch.where(values > floor, values, 0).to(matrix))
        self.register_buffer("vectors", vectors.to(matrix).contiguous())

    def to_basis(self, x: Tensor) -> Tensor:
        if len(self.vectors) == 1:
            return x @ self.vectors[0]
        return torch.einsum("...ki,kij->...kj", x, self.vectors)

    def from_basis(self, z: Tensor) -> Tensor:
        if len(self.vectors) == 1:
            return z @ self.vectors[0].mT
        return torch.einsum("...kj,kij->...ki", z, self.vectors)

    def options(self) -> dict[str, Tensor]:
        return {"values": self.values, "vectors": self.vectors}

    @classmethod
    def restored(cls, options: dict[str, Tensor]) -> Self:
        covariance = cls.__new__(cls)
        Covariance.__init__(covariance, options["values"])
        covariance.register_buffer("vectors", options["vectors"])
        return covariance


class StationaryCovariance(Covariance):
    """A C_k that is the same everywhere on a circular grid: convolution, by the power spectrum.

    The basis is that of the discrete Hartley transform, Re F − Im F with the orthonormal Fourier
    transform F. It is real, and its own inverse. Channels are independent.

    >>> StationaryCovariance(torch.tensor([[3.0, 1.0]]), grid=1).matrix().round()
    tensor([[[2., 1.],
             [1., 2.]]])

    Args:
        spectrum: λ ≥ 0 at the frequencies of ``torch.fft.fftfreq``, the same at f and −f:
            (K, *shape), or (1, *shape) for one covariance of all components. It is the unnormalised
            Fourier transform of the autocovariance; its mean over a grid is the pixel variance.
        grid: how many of the last dimensions make up the grid: 2 for images, 1 for vectors.

    Raises:
        InputError: if the spectrum is negative, not finite, or differs between f and −f.
    """

    def __init__(self, spectrum: Tensor, grid: int = 2) -> None:
        check_value("grid", grid, int)
        if not 1 <= grid < spectrum.ndim:
            raise InputError(
                f"A spectrum of shape {tuple(spectrum.shape)} has components first and a grid of "
                f"{grid} dimensions last; give more dimensions, or a grid of at least 1."
            )
        super().__init__(spectrum.flatten(1))
        self.shape, self.grid = tuple(spectrum.shape[1:]), grid
        axes = tuple(range(-grid, 0))
        mirrored = spectrum.flip(axes).roll((1,) * grid, axes)
        if not torch.allclose(spectrum, mirrored):
            raise InputError("A power spectrum must be the same at f and −f.")

    def to_basis(self, x: Tensor) -> Tensor:
        axes = tuple(range(-self.grid, 0))
        fourier = torch.fft.fftn(x.unflatten(-1, self.shape), dim=axes, norm="ortho")
        return (fourier.real - fourier.imag).flatten(-len(self.shape))

    def from_basis(self, z: Tensor) -> Tensor:
        return self.to_basis(z)

    def variances(self) -> Tensor:
        spectrum = self.values.unflatten(1, self.shape)
        axes = tuple(range(-self.grid, 0))
        return spectrum.mean(axes, keepdim=True).expand_as(spectrum).flatten(1)

    def options(self) -> dict[str, Tensor]:
        spectrum = self.values.unflatten(1, self.shape)
        return {"spectrum": spectrum, "grid": torch.tensor(self.grid)}

    @classmethod
    def restored(cls, options: dict[str, Tensor]) -> Self:
        return cls(options["spectrum"], int(options["grid"]))


def diagonal(variances: Tensor | float, means: Tensor) -> DiagonalCovariance:
    """Return the covariance of a number, (K,) or (K, *shape), expanded to the means' shape."""
    values = per_sample(variances, means)
    shared = values.ndim == 0 or len(values) == 1
    try:
        values = values.expand_as(means[:1] if shared else means)
    except RuntimeError as error:
        raise InputError(
            f"The variances must be a number, (K,) or (K, *shape) for means of shape "
            f"{tuple(means.shape)}, got {tuple(values.shape)}."
        ) from error
    return DiagonalCovariance(values.clone())


KINDS: dict[str, type[Covariance]] = {
    kind.__name__: kind for kind in (DiagonalCovariance, DenseCovariance, StationaryCovariance)
}
