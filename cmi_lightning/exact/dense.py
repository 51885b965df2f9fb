"""Exact posteriors and exact conditional mutual information of small problems, by dense matrices.

What samplers and guidances estimate, this module computes: in n³ time and n² memory, or more, for
images of n numbers. It takes any denoiser, so that a network can be checked on small images. All
functions treat dimension 0 as a batch of separate problems.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmi_lightning.denoisers.base import Denoiser
from cmi_lightning.errors import InputError
from cmi_lightning.exact.mixture import GaussianMixture
from cmi_lightning.operators.base import LinearOperator, Operator
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level


class DenseProblem(NamedTuple):
    """One sample's y = A x₀ + n, without the padding of its batch.

    >>> from cmi_lightning.operators import Dense
    >>> problem = Problem(torch.ones(1, 1), Dense(torch.ones(1, 2)), 0.1)
    >>> as_dense(problem)
    DenseProblem(matrix=tensor([[1., 1.]]), y=tensor([1.]), std=tensor([0.1000]))

    Attributes:
        matrix: A (m, n) on the flattened image.
        y: (m,).
        std: noise standard deviations (m,).
    """

    matrix: Tensor
    y: Tensor
    std: Tensor


def as_matrix(operator: Operator, y: Tensor, row: int = 0) -> Tensor:
    """Return A of one sample of a batch, dense (m, n), one column per forward pass.

    A is bound to images; of their measurements y (B, *m), shape, dtype and device are read. m
    counts what is measured of the sample: padding is left out.

    Raises:
        InputError: if A is not linear.
    """
    if not isinstance(operator, LinearOperator):
        raise InputError(f"{type(operator).__name__} has no matrix: it is not linear.")
    keep = operator.zero_padding(torch.ones_like(y))[row].flatten() > 0
    columns, size = [], torch.Size(operator.image_shape).numel()
    with torch.no_grad():
        for unit in torch.eye(size, dtype=y.dtype, device=y.device):
            images = unit.reshape(operator.image_shape).expand(len(y), *operator.image_shape)
            columns.append(operator(images)[row].flatten()[keep])
    return torch.stack(columns, dim=1)


def as_dense(problem: Problem, row: int = 0) -> DenseProblem:
    """Return one sample of a batch's problem by dense tensors; see :func:`as_matrix`."""
    y = problem.y
    keep = problem.operator.zero_padding(torch.ones_like(y))[row].flatten() > 0
    std = problem.std.expand_as(y)[row].flatten()[keep]
    return DenseProblem(as_matrix(problem.operator, y, row), y[row].flatten()[keep], std)


def exact_posterior(prior: GaussianMixture, problem: Problem, row: int = 0) -> GaussianMixture:
    """Return the exact p(x₀ | y) of one sample; see :meth:`GaussianMixture.condition`."""
    return prior.condition(*as_dense(problem, row))


def jacobian(denoiser: Denoiser, x: Tensor, level: Level, create_graph: bool = False) -> Tensor:
    """Return J = ∂x̂₀/∂x_t at x_t (B, *), J[b, i, j] = ∂x̂₀[b, i]/∂x_t[b, j], (B, n, n).

    In closed form for an exact prior, else by n vector-Jacobian products. ``create_graph`` keeps
    the graph, for derivatives with respect to x.
    """
    # A subclass may have another x̂₀, and then has another Jacobian.
    if isinstance(denoiser, GaussianMixture) and type(denoiser).forward is GaussianMixture.forward:
        with torch.set_grad_enabled(create_graph):
            return denoiser.jacobian(x, level)
    with torch.enable_grad():
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        return _gradients(denoiser(x, level).x0.flatten(1), x, create_graph)


def covariance(denoiser: Denoiser, x: Tensor, level: Level, create_graph: bool = False) -> Tensor:
    """Return Cov[x₀ | x_t] = (σ²/α) J (B, n, n) by Tweedie's formula; see :func:`jacobian`."""
    return level.sigma**2 / level.alpha * jacobian(denoiser, x, level, create_graph)


def information(
    denoiser: Denoiser, x: Tensor, level: Level, matrix: Tensor, std: Tensor | float
) -> Tensor:
    """Return I(x₀; y | x_t) = ½ log det(1 + Σ_n^{-1/2} A P Aᵀ Σ_n^{-1/2}) in nats, (B,).

    P = Cov[x₀ | x_t] is Tweedie's, and x₀ | x_t is taken as Gaussian. NaN where a network's P makes
    the determinant negative; :func:`spectral_information` is defined for any P.

    Args:
        denoiser: the prior.
        x: x_t (B, *), n numbers a sample.
        level: the noise level of x_t.
        matrix: A (m, n), or (B, m, n) if every sample has its own; see :func:`as_matrix`.
        std: noise standard deviation > 0: a number, (m,) or (B, m).

    Raises:
        InputError: if the measurement has no noise (I is infinite), or the matrix does not fit.

    Source: Hamidi & Yang (2025), Theorem 1, by the determinant lemma.
    """
    S = _measured(covariance(denoiser, x, level), _whitened(x, matrix, std))
    return 0.5 * torch.logdet(S)


def spectral_information(
    denoiser: Denoiser, x: Tensor, level: Level, matrix: Tensor, std: Tensor | float
) -> Tensor:
    """Return ½ Σ_i log max(λ_i, 1) in nats, (B,), λ the eigenvalues of the symmetric part of S.

    S = 1 + Σ_n^{-1/2} A P Aᵀ Σ_n^{-1/2}. The same as :func:`information` for an exact prior, and
    what :class:`cmi_lightning.information.Lanczos` estimates for a network, whose P may be
    indefinite. Args and errors as there.
    """
    S = _measured(covariance(denoiser, x, level), _whitened(x, matrix, std))
    return 0.5 * torch.linalg.eigvalsh(0.5 * (S + S.mT)).clamp_min(1).log().sum(1)


def gradient(
    denoiser: Denoiser, x: Tensor, level: Level, matrix: Tensor, std: Tensor | float
) -> Tensor:
    """Return ∇_{x_t} I = ½ tr[Aᵀ S⁻¹ A ∇P] (B, *), with S = A P Aᵀ + Σ_n.

    Theorem 2 by Woodbury's identity. M = Aᵀ S⁻¹ A is held fixed, so that ½ tr[M P] is
    differentiated once and the third-order tensor ∇P is never formed. Args and errors as in
    :func:`information`. In the scan of the paper that we have, Eq. 14b has lost the second inverse.

    Source: Hamidi & Yang (2025), Theorem 2 and Eq. 14.
    """
    W = _whitened(x, matrix, std)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        P = covariance(denoiser, x, level, create_graph=True)
        M = W.mT @ torch.linalg.solve(_measured(P.detach(), W), W)
        value = 0.5 * (M.mT * P).sum((1, 2))
        return _gradients(value[:, None], x).reshape(x.shape)


def _measured(P: Tensor, W: Tensor) -> Tensor:
    """Return 1 + W P Wᵀ (B, m, m)."""
    return torch.eye(W.shape[1], dtype=P.dtype, device=P.device) + W @ P @ W.mT


def _whitened(x: Tensor, matrix: Tensor, std: Tensor | float) -> Tensor:
    """Return W = Σ_n^{-1/2} A (B, m, n).

    Raises:
        InputError: if the measurement has no noise, or the matrix does not fit the images.
    """
    std = torch.as_tensor(std, dtype=x.dtype, device=x.device)
    if not bool((std > 0).all()):
        raise InputError("The information needs measurement noise: std must be above 0.")
    A = matrix.to(x)
    A = A if A.ndim == 3 else A.expand(len(x), *A.shape)
    if A.ndim != 3 or len(A) != len(x) or A.shape[2] != x[0].numel():
        raise InputError(
            f"The operator's matrix must be (m, {x[0].numel()}) or ({len(x)}, m, {x[0].numel()}), "
            f"got {tuple(matrix.shape)}."
        )
    return A / std.expand(*A.shape[:2])[..., None]


def _gradients(values: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    """Return the derivatives of values (B, i) by x (B, *), (B, i, n), one pass per i."""
    if not values.requires_grad:  # a Jacobian that is the same everywhere
        return values.new_zeros(*values.shape, x[0].numel())
    rows = [
        torch.autograd.grad(
            value.sum(), x, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )[0]
        for value in values.unbind(1)
    ]
    return torch.stack(rows, dim=1).flatten(2)
