"""Resampling: every stretch of the chain is walked several times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class Resampled(Solver):
    """Another solver that goes down ``jump`` levels, up again by the forward chain, and so on.

    Up means x_t = (α_t/α_s) x_s + √β z. After ``repeats`` walks the chain goes on below. The walks
    let what is unknown agree with what is known. With MCG(scale=0), which puts the noised
    measurement in at every level, this is RePaint. The cost is ``repeats`` times the solver's.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.guidance import MCG
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), Resampled(DDPM(), 10, 10), [MCG(0.0)], num_steps=50)

    Args:
        solver: what steps.
        jump: levels of a walk, at least 1.
        repeats: walks over every level, at least 1.

    Raises:
        InputError: if the solver is resampled already.

    Source: Lugmayr et al. (2022), Alg. 1; Wang et al. (2023), "time travel".
    """

    solver: Solver
    jump: int = number(10, "[1, inf)")
    repeats: int = number(10, "[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver.repeats > 1:
            raise InputError("Resampled.solver is Resampled itself; give the solver that steps.")
        for name in ("needs_variance", "needs_linear", "needs_noise", "hooks"):
            object.__setattr__(self, name, getattr(self.solver, name))

    @property
    def stochastic(self) -> bool:
        """As the solver."""
        return self.solver.stochastic

    def levels(self, schedule: Schedule, num_steps: int | str | None) -> Schedule:
        return self.solver.levels(schedule, num_steps)

    def evaluations(self, chain: Schedule, prior: Schedule) -> int:
        return self.solver.evaluations(chain, prior)

    def start(self, level: Level, problem: Problem, noise: SampleNoise, like: Tensor) -> Tensor:
        return self.solver.start(level, problem, noise, like)

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        return self.solver.transition(step, guided_x0)
