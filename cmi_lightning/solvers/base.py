"""The contract of a solver: from x_t to a proposal for x_s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from cmi_lightning.step import Step, Transition

GuidedX0 = Callable[[Step], Tensor]


class Solver(ABC):
    """Turns x̂₀ into a transition; it alone decides how often the network is asked.

    >>> class Direct(Solver):  # to x̂₀, in every step
    ...     stochastic = False
    ...     def transition(self, step, guided_x0):
    ...         mean = step.s.alpha * guided_x0(step)
    ...         return Transition(mean, step.s.sigma, step.normal("solver"))

    Attributes:
        needs_variance: the solver reads the network's learned variance.
    """

    needs_variance = False  # without annotation: see Guidance

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether the transition injects noise."""

    @abstractmethod
    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        """Return the proposal for x_s.

        Args:
            step: x_t and its levels.
            guided_x0: returns the guided, clamped x̂₀ (B, *) of a step, without graph. Multi-stage
                solvers call it again with ``step.at(x, level)``.
        """
