"""Stopping by discrepancy: no pull where the residual is the noise's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.linalg import per_sample
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class Discrepancy(Guidance):
    """Another guidance, which rests in samples whose ‖y − A x̂₀‖ is at most ``factor``·σ_y√m.

    A residual below that of the noise means that noise is being fitted. Each sample rests, and goes
    on, by itself. The cost is the guidance's.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.guidance import DPS
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [Discrepancy(DPS(2.0))], num_steps=100)

    Args:
        guidance: what pulls.
        factor: on the noise's norm, above 0.

    Source: Morozov's discrepancy principle (1966), as SITCOM and FLAIR use it.
    """

    guidance: Guidance
    factor: float = number(1.0, "(0, inf)")
    needs_noise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("differentiable", "stochastic", "needs_linear"):
            object.__setattr__(self, name, getattr(self.guidance, name))

    @property
    def hooks(self) -> set[str]:
        """Those of the guidance."""
        return self.guidance.hooks

    @property
    def derivatives(self) -> int:
        """As often as the guidance."""
        return self.guidance.derivatives

    @property
    def active(self) -> bool:
        """Whether the guidance is."""
        return self.guidance.active

    def passes(self, calls: int, chain: Schedule) -> float:
        return self.guidance.passes(calls, chain)

    def for_chain(self, schedule: Schedule, passes: float) -> Discrepancy:
        return replace(self, guidance=self.guidance.for_chain(schedule, passes))

    def plan(self, linear: bool = True) -> str | None:
        return self.guidance.plan(linear)

    def _where_far(self, step: Step, moved: Tensor, left: Tensor) -> Tensor:
        _ = step.residual
        far = step.log["residual"] > self.factor * step.problem.noise_norm
        return torch.where(per_sample(far, moved).bool(), moved, left)

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        moved = self.guidance.guide_denoised(step, x0)
        return moved if moved is x0 else self._where_far(step, moved, x0)

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        moved = self.guidance.guide_transition(step, transition)
        if moved is transition:
            return transition
        parts = ((moved.mean, transition.mean), (moved.noise, transition.noise))
        mean, noise = (self._where_far(step, *pair) for pair in parts)
        return replace(moved, mean=mean, noise=noise)

    def guide_sample(self, step: Step, x: Tensor) -> Tensor:
        moved = self.guidance.guide_sample(step, x)
        return moved if moved is x else self._where_far(step, moved, x)
