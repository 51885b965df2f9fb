"""Per-sample linear algebra: every function treats dimension 0 as a batch of separate problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """Shape per-sample scalars (B,) so that they broadcast against ``like`` (B, *)."""
    if isinstance(value, (int, float)):  # filled on the device: nothing is copied
        return torch.full((), value, dtype=like.dtype, device=like.device)
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(-1, *(1,) * (like.ndim - 1)) if value.ndim == 1 else value


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩ per sample, (B,)."""
    return (a * b).flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Return the Euclidean norm per sample, (B,); its gradient at 0 is 0."""
    return torch.linalg.vector_norm(a.flatten(1), dim=1)


def unit(a: Tensor) -> Tensor:
    """Return a/‖a‖ per sample; 0 stays 0."""
    return a / per_sample(norm(a).clamp_min(torch.finfo(a.dtype).tiny), a)


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Solve M z = b, M symmetric positive (semi-)definite, per sample.

    A sample stops on its own once ‖M z − b‖ ≤ tolerance·‖b‖, or where the search direction has no
    curvature left; its result does not depend on the rest of the batch.

    Args:
        matvec: applies M to (B, *).
        b: right-hand side (B, *).
        iterations: the most iterations to take.
        tolerance: relative residual at which a sample is done.

    Returns:
        z (B, *), and the relative residual (B,) as the recursion has it.

    Source: Hestenes & Stiefel (1952).
    """
    z, r = torch.zeros_like(b), b
    p, rr = r, dot(r, r)
    bb = rr.clamp_min(torch.finfo(b.dtype).tiny)
    active = rr > 0
    for _ in range(iterations):
        if not bool(active.any()):
            break
        mp = matvec(p)
        curvature = dot(p, mp)
        active = active & (curvature > 0)
        step = torch.where(active, rr / curvature.where(active, torch.ones_like(rr)), 0.0)
        z = z + per_sample(step, p) * p
        r = r - per_sample(step, p) * mp
        new = dot(r, r)
        ratio = torch.where(active, new / rr.where(active, torch.ones_like(rr)), 0.0)
        p = r + per_sample(ratio, p) * p
        rr = torch.where(active, new, rr)
        active = active & (rr > tolerance**2 * bb)
    return z, (rr / bb).sqrt()


@dataclass(frozen=True)
class KrylovSpace:
    """span{v, Mv, …} with the symmetric part of M restricted to it, per sample.

    >>> space = krylov(lambda v: 4 * v, torch.ones(1, 3), dimension=2)
    >>> space.apply(torch.sqrt)[0]
    tensor([[2.0000, 2.0000, 2.0000]])

    Attributes:
        basis: orthonormal vectors, (B, k, m); zero where the space ended early.
        values: eigenvalues of the restriction, (B, k), float64 on the CPU where k > 1.
        vectors: its eigenvectors, (B, k, k), likewise.
        length: ‖v‖, (B,).
        rest: norm of the part of the last image that left the space, (B,).
        shape: shape of v.
    """

    basis: Tensor
    values: Tensor
    vectors: Tensor
    length: Tensor
    rest: Tensor
    shape: torch.Size

    def apply(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return f(M) v ≈ ‖v‖ Q f(T) e₁ (B, *), and ‖rest‖·|last coefficient|/‖v‖ (B,).

        The second is the relative residual of conjugate gradients when f(λ) = 1/λ.
        """
        coefficients = self._coefficients(f)
        applied = (coefficients[..., None] * self.basis).sum(1) * self.length[:, None]
        return applied.reshape(self.shape), self.rest * coefficients[:, -1].abs()

    def combine(self, f: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> Tensor:
        """Return B f(M) v (B, *) for a linear map B of which the basis' images are known."""
        coefficients = self._coefficients(f) * self.length[:, None]
        return torch.stack(
            [per_sample(c, b) * b for c, b in zip(coefficients.unbind(1), images, strict=True)]
        ).sum(0)

    def _coefficients(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(T) e₁ (B, k)."""
        coefficients = (self.vectors * self._of(f)[:, None]) @ self.vectors[:, 0, :, None]
        return coefficients[..., 0].to(self.basis)

    def quadratic(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return vᵀ f(M) v ≈ ‖v‖² e₁ᵀ f(T) e₁ (B,)."""
        weights = self.vectors[:, 0] ** 2
        return (weights * self._of(f)).sum(1).to(self.length) * self.length**2

    def _of(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(values), NaN where the values are: a comparison in f would hide them."""
        return torch.where(self.values.isnan(), torch.nan, f(self.values))


def krylov(matvec: Callable[[Tensor], Tensor], v: Tensor, dimension: int) -> KrylovSpace:
    """Build the Krylov space of M and v (B, *), per sample, by Arnoldi's process.

    Images are orthogonalised twice against the whole basis, and the restriction Qᵀ M Q is
    symmetrised: for a symmetric M this is Lanczos' method with full reorthogonalisation, for any
    other it projects the symmetric part of M. No inverse is taken, so an indefinite M is harmless.

    Args:
        matvec: applies M to (B, *).
        v: start (B, *).
        dimension: k, one application of M each.

    Source: Golub & Meurant (2010), Ch. 4 and 7.
    """
    flat = v.flatten(1)
    length = norm(flat)
    tiny = torch.finfo(v.dtype).eps
    q, basis, images = unit(flat), [], []
    rest = length
    for _ in range(dimension):
        basis.append(q)
        image = matvec(q.reshape(v.shape)).flatten(1)
        images.append(image)
        Q = torch.stack(basis, 1)
        remainder = image
        for _ in range(2):
            inner = (Q * remainder[:, None]).sum(2, keepdim=True)
            remainder = remainder - (inner * Q).sum(1)
        rest = norm(remainder)
        # An invariant subspace is found: what is left is rounding, and the basis ends in zeros.
        ended = rest <= 10 * tiny * norm(image)
        rest = torch.where(ended, 0.0, rest)
        q = torch.where(ended[:, None], 0.0, unit(remainder))
    M = torch.stack(images, 1)
    if dimension == 1:  # no decomposition, and no wait for the device
        return KrylovSpace(
            Q, (Q * M).sum(2), torch.ones_like(rest)[:, None, None], length, rest, v.shape
        )
    T = (Q @ M.mT).cpu().double()  # not every accelerator has float64
    finite = torch.isfinite(T).all(2, keepdim=True).all(1, keepdim=True)
    # A sample that has diverged shall not stop the others: eigh refuses what is not finite.
    values, vectors = torch.linalg.eigh(torch.where(finite, 0.5 * (T + T.mT), 0.0))
    values = torch.where(finite[..., 0], values, torch.nan)
    return KrylovSpace(Q, values, vectors, length, rest, v.shape)
