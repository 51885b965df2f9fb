"""DMPS: the likelihood of a flat prior."""

from __future__ import annotations

from dataclasses import dataclass

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DMPS(Guidance):
    """x_s ← x_s + c Aᵀ(A Aᵀ + Σ_n/ϱ²)⁻¹(y − A x_t/α_t), ϱ = σ_t/α_t: what a flat prior would say.

    x₀ | x_t is taken as N(x_t/α_t, ϱ²), so that p(y | x_t) needs no network: no gradient, no step
    size. c is DDPM's weight of x̂₀, with which this is the score of p(y | x_t). The correction has
    the noise of x_t, and so is added behind the clamp of x̂₀. It is biased where the prior is narrow
    against ϱ, by a third of a posterior standard deviation on the Gaussian test problem. Scattered
    single pixels (random inpainting) it pins without noise, which networks do not know: not for
    that.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [DMPS()], num_steps=100)

    Source: Meng & Kabashima (2022).
    """

    differentiable = False
    needs_linear = True

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        x = step.x.detach() / step.t.alpha
        moved = step.problem.prox(x, (step.t.sigma / step.t.alpha) ** 2) - x
        return transition.shift(step.coefficients.from_x0 * moved)
