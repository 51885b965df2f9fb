"""DMPS: the likelihood of a flat prior."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step


@dataclass(frozen=True)
class DMPS(Guidance):
    """x̂₀ ← x̂₀ + Aᵀ(A Aᵀ + Σ_n/ϱ²)⁻¹(y − A x_t/α_t), ϱ = σ_t/α_t: what a flat prior would say.

    x₀ | x_t is taken as N(x_t/α_t, ϱ²), so that p(y | x_t) needs no network: no gradient, no step
    size. It is biased where the prior is narrow against ϱ, by a third of a posterior standard
    deviation on the Gaussian test problem.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [DMPS()], num_steps=100)

    Source: Meng & Kabashima (2022), as an edit of x̂₀.
    """

    differentiable = False
    needs_linear = True

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        """Add the flat prior's correction."""
        x = step.x.detach() / step.t.alpha
        return x0 + step.problem.prox(x, (step.t.sigma / step.t.alpha) ** 2) - x
