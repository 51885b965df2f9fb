"""LLE: learned linear extrapolation of x̂₀ over the steps of a short chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmi_lightning.errors import InputError, counted
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step


@dataclass(frozen=True)
class LLE(Guidance):
    """x̃ₖ = P Σⱼ aₖⱼ x̃ⱼ + (1 − P) Σⱼ bₖⱼ x̃ⱼ over this and all earlier steps; put it last.

    P = A⁺A is what y sees; the last x̃ⱼ of the sum is this step's x̂₀, after the guidances before.
    x̃ₖ goes to the solver and into the history. For a nonlinear A, P = 1. The coefficients belong to
    one prior, task, method and number of steps, and ``cmi-lightning lle`` finds them; a = b = 1 for
    the last and 0 elsewhere is the method itself. It costs no network pass.

    >>> LLE(seen=[[1.0], [0.2, 0.8]], unseen=[[1.0], [-0.1, 1.1]]).active
    True

    Args:
        seen: a, one list a step, of 1, 2, … numbers.
        unseen: b, likewise; for a nonlinear A it is not read.

    Raises:
        InputError: if the lists are of other lengths, or for another number of steps.

    Source: "Learnable linear extrapolation" (arXiv 2503.10103, 2025).
    """

    seen: list[list[float]]
    unseen: list[list[float]]
    differentiable = False

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = [len(row) for row in self.seen]
        if lengths != list(range(1, len(lengths) + 1)) or lengths != [len(r) for r in self.unseen]:
            raise InputError(
                f"LLE.seen and LLE.unseen must hold 1, 2, 3, … numbers a step, got {lengths} and "
                f"{[len(row) for row in self.unseen]}."
            )

    def for_chain(self, schedule: Schedule, passes: float) -> LLE:
        if len(schedule) != len(self.seen):
            raise InputError(
                f"LLE's coefficients are for {counted(len(self.seen), 'step')} and the chain has "
                f"{len(schedule)}: set model.num_steps, or train them anew (cmi-lightning lle)."
            )
        return self

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        k = step.num_steps - 1 - step.index
        return combined(step, history(step, x0), self.seen[k], self.unseen[k])


def history(step: Step, x0: Tensor) -> list[Tensor]:
    """Return x̃ of the steps before, and x̂₀ (B, *)."""
    names = (f"lle/{k}" for k in range(step.num_steps - 1 - step.index))
    return [*(step.memory[name] for name in names), x0.detach()]


def projected(step: Step, x: Tensor) -> Tensor:
    """Return P x (B, *)."""
    A = step.problem.operator
    return A.pinv(A(x)) if isinstance(A, LinearOperator) else x


def combined(step: Step, past: list[Tensor], a: Sequence[float], b: Sequence[float]) -> Tensor:
    """Return x̃, and keep it in the step's memory."""
    seen, unseen = (
        torch.stack([c * x for c, x in zip(w, past, strict=True)]).sum(0) for w in (a, b)
    )
    x = unseen + projected(step, seen - unseen)
    step.memory[f"lle/{len(past) - 1}"] = x
    return x
