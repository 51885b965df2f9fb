"""Pseudo-inverse guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class PiGDM(Guidance):
    """ΠGDM: p(y | x_t) ≈ N(A x̂₀, r² A Aᵀ + Σ_n), with r² the variance of an isotropic posterior.

    g = r² ∇_{x_t} log p(y | x_t) = Jᵀ Aᵀ (A Aᵀ + Σ_n/r²)⁻¹ (y − A x̂₀) and
    x_s ← x_s + w g. The solve is the operator's closed form, or conjugate gradients where there is
    none (blur with reflected borders and a kernel that is not separable). A nonlinear A enters
    by its derivative at x̂₀ (a Gauss–Newton step).

    There is no official code for noisy measurements, and re-implementations differ in r² and w,
    which are options here. Differs from the published code (noiseless): Σ_n is not ignored; x_N is
    not started from A⁺y; x̂₀ is clamped for the solver only, not inside g.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [PiGDM(prior_variance=0.5)], num_steps=100)

    Args:
        prior_variance: v, the variance of clean images; r² = v σ_t²/(v α_t² + σ_t²). v = 1 gives
            the paper's r² = 1 − ᾱ_t; v = inf gives σ_t²/α_t².
        weight: "canonical" w = α_s α_t (as most re-implementations); "paper" w = α_t; "posterior"
            moves x̂₀ to E[x₀ | x_t, y] = x̂₀ + (σ_t²/α_t) ∇ log p(y | x_t), before the solver.
        scale: factor on g.

    Source: Song et al. (2023), Alg. 1.
    """

    prior_variance: float = number(1.0, "(0, inf]")
    weight: Literal["canonical", "paper", "posterior"] = "canonical"
    scale: float = 1.0

    @property
    def hooks(self) -> set[str]:
        """The one that the weight moves."""
        return {"guide_denoised" if self.weight == "posterior" else "guide_transition"}

    @property
    def active(self) -> bool:
        """Whether the scale ≠ 0."""
        return self.scale != 0

    def posterior_variance(self, step: Step) -> float:
        """Return r² at the step's level."""
        alpha, sigma = step.t.alpha, step.t.sigma
        return sigma**2 / (alpha**2 + sigma**2 / self.prior_variance)

    def direction(self, step: Step) -> Tensor:
        """Return g (B, *)."""
        A = step.linearized
        shift = step.problem.std**2 / self.posterior_variance(step)
        return step.vjp(A.adjoint(A.solve(step.residual.detach(), shift)))

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        if self.weight != "posterior":
            return x0
        factor = step.covariance_factor / self.posterior_variance(step)
        return x0 + self.scale * factor * self.direction(step)

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        if self.weight == "posterior":
            return transition
        weight = step.t.alpha * (step.s.alpha if self.weight == "canonical" else 1.0)
        return transition.shift(self.scale * weight * self.direction(step))
