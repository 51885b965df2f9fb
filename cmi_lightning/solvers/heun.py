"""Heun's second-order solver of the probability-flow equation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class Heun(Solver):
    """Trapezoidal rule for dx̄/dσ̄ = (x̄ − x̂₀)/σ̄ in x̄ = x/α, σ̄ = σ/α; two evaluations a step.

    The last step, to σ = 0, is Euler's: x = x̂₀. Deterministic.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), Heun(), num_steps=50)

    Source: Karras et al. (2022), Alg. 1 (without churn).
    """

    stochastic = False  # type: ignore[misc]

    def evaluations(self, chain: Schedule, prior: Schedule) -> int:
        """Return two a step, and one for the last."""
        return 2 * len(chain) - 1

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        t, s = step.t, step.s

        def slope(x: Tensor, x0: Tensor, level: Level) -> Tensor:
            return (x - level.alpha * x0) / level.sigma

        x = step.x.detach()
        change = s.sigma / s.alpha - t.sigma / t.alpha
        d = slope(x, guided_x0(step), t)
        x_s = s.alpha * (x / t.alpha + change * d)
        if s.sigma > 0:
            d_s = slope(x_s, guided_x0(step.at(x_s, s)), s)
            x_s = s.alpha * (x / t.alpha + change * 0.5 * (d + d_s))
        return Transition(x_s, 0.0, torch.zeros_like(x_s))
