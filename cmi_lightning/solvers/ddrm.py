"""Denoising diffusion restoration models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.linalg import per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DDRM(Solver):
    """x_s = V[α_s(x̂₀ + Λ(ȳ − x̂₀)) + d₁ z + d₂ ε̂] along the singular directions of A, ȳ = Uᵀy/s.

    - s = 0: Λ = 0, d₁ = η σ_s, d₂ = √(1 − η²) σ_s;
    - s σ_s ≥ α_s σ_y: Λ = η_b, d₁ = √(σ_s² − η_b² α_s² σ_y²/s²), d₂ = 0;
    - s σ_s < α_s σ_y: Λ = √(1 − η²) s σ_s/(α_s σ_y), d₁ = η σ_s, d₂ = 0.

    With η_b = 1 this is DDNM+ step for step; :class:`DDNMPlus` serves operators without singular
    values. One evaluation a step, no gradient.

    Differs from the code: nothing is truncated (there, singular values below 0.03 count as 0 and
    their measurement enters as noise); σ_y = 0 keeps y to the last step.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), DDRM(), num_steps=20, clamp=False)

    Args:
        eta: η, the share of new noise where y tells little or nothing.
        eta_b: η_b, the weight of y where it tells more than x_t.

    Raises:
        InputError: for an operator without singular values, or noise that differs between the
            measurements of one image.

    Source: Kawar et al. (2022), Eq. 7 and 8.
    """

    eta: float = number(0.85, "[0, 1]")
    eta_b: float = number(1.0, "[0, 1]")
    stochastic = True  # type: ignore[misc]
    conditional = True
    needs_linear = True

    def start(self, level: Level, problem: Problem, noise: SampleNoise, like: Tensor) -> Tensor:
        """Return α times ȳ and what noise it lacks, where it is less noisy than the level."""
        std, ratio = _std(problem, like), level.sigma / level.alpha
        A, z = problem.operator.linearize(like), noise.normal("start", 0, like)

        def known(s: Tensor) -> Tensor:
            return (s * ratio > std) / _safe(s) ** 2

        def missing(s: Tensor) -> Tensor:
            return (ratio**2 - known(s) * std**2).clamp_min(0).sqrt()

        x = A.spectral(A.adjoint(problem.y), known)
        return level.alpha * (x + A.spectral(z, missing))

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        A, s, x0 = step.linearized, step.s, guided_x0(step)
        std, z = _std(step.problem, x0), step.normal("solver")
        epsilon = (step.x.detach() - step.t.alpha * step.x0.detach()) / step.t.sigma
        rest = (1 - self.eta**2) ** 0.5

        def weight(v: Tensor) -> Tensor:  # Λ/s²: Aᵀr = V s² (ȳ − x̂₀)
            clear, vague = self.eta_b / _safe(v) ** 2, rest * s.sigma / (_safe(v * s.alpha * std))
            return torch.where(v * s.sigma >= s.alpha * std, clear, vague) * (v > 0)

        def fresh(v: Tensor) -> Tensor:
            used = self.eta_b * s.alpha * std / _safe(v)
            clear = (s.sigma**2 - used**2).clamp_min(0).sqrt()
            seen = (v > 0) & (v * s.sigma >= s.alpha * std)
            return torch.where(seen, clear, self.eta * s.sigma)

        x0 = x0 + A.spectral(A.adjoint(step.problem.y - A(x0)), weight)
        kept = A.spectral(epsilon, lambda v: rest * s.sigma * (v == 0))
        return Transition(s.alpha * x0 + kept, 1.0, A.spectral(z, fresh))


def _std(problem: Problem, like: Tensor) -> Tensor:
    """Return σ_y, broadcastable to images (B, *)."""
    std = per_sample(problem.noise_std, like)
    if std.ndim and std[0].numel() > 1:
        raise InputError(
            "DDRM needs one noise level for each image, and here it differs between measurements: "
            "use solver/ddnm."
        )
    return std


def _safe(value: Tensor) -> Tensor:
    """Return the value, 1 where it is 0: for quotients that are not used there."""
    return torch.where(value > 0, value, 1.0)
