"""DPS without a step size: the residual's variance is annealed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.linalg import norm, per_sample, unit
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.step import Step

POWERS = 8


@dataclass(frozen=True)
class AnnealedDPS(Guidance):
    """x̂₀ ← x̂₀ + (σ_t²/α_t) Jᵀ Aᵀ(y − A x̂₀)/(σ_y² + a² σ_t²/α_t²), with J = ∂x̂₀/∂x_t.

    This is Tweedie's x̂₀ for p(y | x_t) ≈ N(A x̂₀, σ_y² + a² σ_t²/α_t²): no step size. a² is the
    largest eigenvalue of A Aᵀ, by power iterations; it is 1 for masks and blur. Where A Aᵀ = 1 it
    is ΠGDM (weight "posterior") with a flat prior. Cost of a step: DPS's.

    Differs from deepinv, which has a = 1 always. For ×4 super-resolution a² is about 1/16, and
    x̂₀ then moves too little to reach y.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [AnnealedDPS()], num_steps=100)

    Source: deepinv's ``DPSDataFidelity(guidance="annealed")``.
    """

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        A, gain = step.linearized, step.memory.get("annealed/gain")
        if gain is None or not isinstance(step.problem.operator, LinearOperator):
            gain = step.memory["annealed/gain"] = _gain(step)
        variance = step.problem.std**2 + gain * (step.t.sigma / step.t.alpha) ** 2
        return x0 + step.covariance_factor * step.vjp(A.adjoint(step.residual.detach() / variance))


def _gain(step: Step) -> Tensor:
    """Return a² of each sample, broadcastable to y."""
    A = step.linearized
    n = step.problem.operator.sample_noise(_fixed, step.problem.y)
    for _ in range(POWERS):
        n = A(A.adjoint(unit(n)))
    return per_sample(norm(n), n)


def _fixed(like: Tensor) -> Tensor:
    """Return the same normal vector for every sample, like (B, *m)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape[1:], generator=generator).to(like).expand_as(like)
