"""The contract of a solver: from x_t to a proposal for x_s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from cmi_lightning.checked import Checked
from cmi_lightning.errors import warn_once
from cmi_lightning.guidance.base import HOOKS
from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.step import Step, Transition

GuidedX0 = Callable[[Step], Tensor]
# The largest α/σ at which a chain may start from pure noise: its mean is then off by a tenth of σ.
SIGNAL_LEFT = 0.1


class Solver(Checked, ABC):
    """Turns x̂₀ into a transition; it alone decides how often the network is asked.

    Options are checked, see :class:`~cmi_lightning.checked.Checked`.

    >>> class Direct(Solver):  # to x̂₀, in every step
    ...     stochastic = False
    ...     def transition(self, step, guided_x0):
    ...         mean = step.s.alpha * guided_x0(step)
    ...         return Transition(mean, step.s.sigma, step.normal("solver"))

    Attributes:
        conditional: the solver brings in the measurement itself, without a guidance.
        needs_variance: the solver reads the network's learned variance.
        needs_linear: the solver needs a linear operator.
        needs_noise: the solver needs measurements with noise.
        hooks: the guidances' hooks that have something to edit, see
            :class:`cmi_lightning.guidance.Guidance`.
        jump: levels of a block that is walked ``repeats`` times, see :class:`Resampled`.
        repeats: how often.
    """

    conditional = False
    needs_variance = False  # without annotation: see Guidance
    needs_linear = False
    needs_noise = False
    hooks = tuple(HOOKS)
    jump = 1
    repeats = 1

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether the transition injects noise."""

    def levels(self, schedule: Schedule, num_steps: int | str | None) -> Schedule:
        """Return the chain's levels, out of those that the prior knows.

        Args:
            schedule: the prior's.
            num_steps: what :meth:`Schedule.respace` takes; None for all levels.
        """
        return schedule if num_steps is None else schedule.respace(num_steps)

    def evaluations(self, chain: Schedule, prior: Schedule) -> int:
        """Return how often a walk down the chain asks the network for x̂₀.

        Args:
            chain: the levels of the walk.
            prior: those that the prior knows.
        """
        return len(chain)

    def start(self, level: Level, problem: Problem, noise: SampleNoise, like: Tensor) -> Tensor:
        """Return x_N at the chain's first level, (B, *) like ``like``.

        It is N(0, α² + σ²): N(0, I) on a DDPM chain. That is the law of x_N where little of x₀ is
        left in it; else a warning says so.
        """
        if level.alpha > SIGNAL_LEFT * level.sigma:
            warn_once(
                f"The chain does not end in noise: its noisiest level has α/σ = "
                f"{level.alpha / level.sigma:.2g}, and sampling starts as if it were 0. Use a "
                "schedule of more noise, or a num_steps that keeps the noisiest level."
            )
        return (level.alpha**2 + level.sigma**2) ** 0.5 * noise.normal("start", 0, like)

    @abstractmethod
    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        """Return the proposal for x_s.

        Args:
            step: x_t and its levels.
            guided_x0: returns the guided, clamped x̂₀ (B, *) of a step, without graph. Multi-stage
                solvers call it again with ``step.at(x, level)``.
        """
