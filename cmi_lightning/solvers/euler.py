"""Euler's method for the probability flow, from noise or from the measurement."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers.ancestral import DDIM
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class Euler(Solver):
    """x_s = α_s x̂₀ + σ_s ε̂: on a rectified schedule x_s = x_t + (σ_s − σ_t) v with v = ε̂ − x̂₀.

    There it is Euler's method for the flow, and everywhere DDIM(0). With ``start_signal`` the
    chain begins at that α/(α + σ), with α A⁺y + σ z in place of noise. So OT-ODE is this solver
    with PiGDM(weight="posterior", prior_variance=1) on a flow-matching prior.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), Euler(start_signal=0.2), num_steps=20)

    Args:
        start_signal: share of signal at the first level, in [0, 1); 0 starts from noise, OT-ODE
            from 0.1 to 0.4.

    Raises:
        InputError: if ``start_signal`` ≠ 0 and the operator is not linear.

    Source: Pokle et al. (2023), Alg. 1, which starts from Aᵀy.
    """

    start_signal: float = number(0.0, "[0, 1)")
    stochastic = False  # type: ignore[misc]

    def levels(self, schedule: Schedule, num_steps: int | str | None) -> Schedule:
        if self.start_signal > 0:
            limit = max(1 / self.start_signal - 1, schedule.range[0])
            ratios = [s / a for a, s in zip(schedule.alphas, schedule.sigmas, strict=True)]
            below = [r for r in ratios if r < limit]
            schedule = schedule.at([*below, min(limit, schedule.range[1])])
        return super().levels(schedule, num_steps)

    def start(self, level: Level, problem: Problem, noise: SampleNoise, like: Tensor) -> Tensor:
        """Return noise, or the noised A⁺y."""
        if self.start_signal == 0:
            return super().start(level, problem, noise, like)
        if not isinstance(problem.operator, LinearOperator):
            raise InputError("Euler.start_signal needs a linear operator: set it to 0.")
        z = noise.normal("start", 0, like)
        return level.alpha * problem.operator.pinv(problem.y) + level.sigma * z

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        return DDIM().transition(step, guided_x0)
