"""Moments of many Gaussians at once: their mixture's covariance, and conditioning on y."""

from __future__ import annotations

import torch
from torch import Tensor

from cmi_lightning.errors import InputError


def mixed(r: Tensor, matrices: Tensor) -> Tensor:
    """Return Σ_k r_k M_k (B, n, n) for r (B, K) and M (K, n, n) or (1, n, n)."""
    return torch.einsum("bk,kij->bij", r, matrices.expand(r.shape[1], -1, -1))


def total_covariance(r: Tensor, means: Tensor, within: Tensor) -> Tensor:
    """Return the covariance (B, n, n) of mixtures with weights (B, K) and means (B, K, n)."""
    apart = means - (r[..., None] * means).sum(1, keepdim=True)
    return mixed(r, within) + torch.einsum("bk,bki,bkj->bij", r, apart, apart)


def conditioned(
    means: Tensor, covariance: Tensor, A: Tensor, y: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Condition N(μ_k, C_k), K of them, on y = A x + n (m,) with n ~ N(0, diag(noise)).

    Returns:
        Means (K, n), covariances (K or 1, n, n), and log N(y; A μ_k, S_k) without 2π, (K,).

    Raises:
        InputError: if measurements without noise determine one another.
    """
    CA = covariance @ A.mT
    S = A @ CA + torch.diag(noise)
    L, failed = torch.linalg.cholesky_ex(S)
    pivots = L.diagonal(dim1=1, dim2=2) ** 2
    rounding = len(A) * torch.finfo(A.dtype).eps * S.diagonal(dim1=1, dim2=2)
    if bool(failed.any()) or bool((pivots <= rounding).any()):
        raise InputError(
            "Measurements without noise determine one another, so that no density exists; set "
            "a noise above 0 or drop the redundant ones."
        )
    residual = (y - means @ A.mT)[..., None]
    white = torch.linalg.solve_triangular(L, residual, upper=False)[..., 0]
    gain = torch.cholesky_solve(CA.mT, L).mT
    shrunk = covariance - gain @ CA.mT
    log_evidence = -0.5 * (white**2).sum(1) - 0.5 * pivots.log().sum(1)
    return means + (gain @ residual)[..., 0], 0.5 * (shrunk + shrunk.mT), log_evidence
