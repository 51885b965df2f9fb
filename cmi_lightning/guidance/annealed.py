"""DPS without a step size: the residual's variance is annealed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step


@dataclass(frozen=True)
class AnnealedDPS(Guidance):
    """x̂₀ ← x̂₀ + (σ_t²/α_t) Jᵀ Aᵀ(y − A x̂₀)/(σ_y² + σ_t²/α_t²), with J = ∂x̂₀/∂x_t.

    This is Tweedie's x̂₀ for p(y | x_t) ≈ N(A x̂₀, σ_y² + σ_t²/α_t²): no step size. Where A Aᵀ = 1
    it is ΠGDM (weight "posterior") with a flat prior. Cost of a step: DPS's.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [AnnealedDPS()], num_steps=100)

    Source: deepinv's ``DPSDataFidelity(guidance="annealed")``.
    """

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        """Move x̂₀ by the annealed likelihood's score."""
        variance = step.problem.std**2 + (step.t.sigma / step.t.alpha) ** 2
        A = step.linearized
        return x0 + step.covariance_factor * step.vjp(A.adjoint(step.residual.detach() / variance))
