"""LLE: learned linear extrapolation of x̂₀ over the steps of a short chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.step import Step

RIDGE = 1e-4  # towards the method itself, as a share of the mean square of its x̂₀


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
        lengths = [len(row) for row in self.seen]
        if lengths != list(range(1, len(lengths) + 1)) or lengths != [len(r) for r in self.unseen]:
            raise InputError(
                f"LLE.seen and LLE.unseen must hold 1, 2, 3, … numbers a step, got {lengths} and "
                f"{[len(row) for row in self.unseen]}."
            )

    def check(self, num_steps: int) -> None:
        """Refuse another number of steps than the coefficients'."""
        if num_steps != len(self.seen):
            raise InputError(
                f"LLE's coefficients are for {len(self.seen)} steps and the chain has {num_steps}: "
                "set model.num_steps, or train them anew (cmi-lightning lle)."
            )

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        """Combine x̂₀ with those of the steps before."""
        k = step.num_steps - 1 - step.index
        return _combined(step, history(step, x0), self.seen[k], self.unseen[k])


@dataclass(frozen=True)
class LLETraining(Guidance):
    """Finds LLE's coefficients step by step, as the chain goes on; its batch is the training set.

    aₖ and bₖ minimise ‖P(x̃ₖ − x₀)‖² and ‖(1 − P)(x̃ₖ − x₀)‖² over the batch, plus a small ridge
    towards the method itself: two least-squares problems with closed solutions.

    Differs from the code: there, 100 epochs of AdamW on MSE + 0.1 LPIPS.

    >>> LLETraining(torch.zeros(1, 2)).coefficients()
    LLE(seen=[], unseen=[])

    Args:
        truth: x₀ (B, *).
        seen: a of the steps done.
        unseen: b of the steps done.

    Source: arXiv 2503.10103, with another loss.
    """

    truth: Tensor
    seen: list[list[float]] = field(default_factory=list)
    unseen: list[list[float]] = field(default_factory=list)
    differentiable = False

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        """Fit this step's coefficients, and use them."""
        past = history(step, x0)
        seen = torch.stack([_projected(step, x) for x in past], 0)
        truth = _projected(step, self.truth)
        a = _fit(seen, truth)
        b = _fit(torch.stack(past, 0) - seen, self.truth - truth)
        self.seen.append(a)
        self.unseen.append(b)
        return _combined(step, past, a, b)

    def coefficients(self) -> LLE:
        """Return the guidance that was found."""
        return LLE([*self.seen], [*self.unseen])


def history(step: Step, x0: Tensor) -> list[Tensor]:
    """Return x̃ of the steps before, and x̂₀ (B, *)."""
    names = (f"lle/{k}" for k in range(step.num_steps - 1 - step.index))
    return [*(step.memory[name] for name in names), x0.detach()]


def _projected(step: Step, x: Tensor) -> Tensor:
    """Return P x (B, *)."""
    A = step.problem.operator
    return A.pinv(A(x)) if isinstance(A, LinearOperator) else x


def _combined(step: Step, past: list[Tensor], a: Sequence[float], b: Sequence[float]) -> Tensor:
    """Return x̃, and keep it in the step's memory."""
    seen, unseen = (
        torch.stack([c * x for c, x in zip(w, past, strict=True)]).sum(0) for w in (a, b)
    )
    x = unseen + _projected(step, seen - unseen)
    step.memory[f"lle/{len(past) - 1}"] = x
    return x


def _fit(parts: Tensor, truth: Tensor) -> list[float]:
    """Return the weights (k,) of the parts (k, B, *) whose sum is nearest to the truth (B, *)."""
    X, y = parts.flatten(1).cpu().double(), truth.flatten().cpu().double()
    gram = X @ X.mT
    own = torch.eye(len(X), dtype=X.dtype)[-1]  # the method itself
    ridge = RIDGE * gram[-1, -1].clamp_min(torch.finfo(X.dtype).tiny)
    normal = gram + ridge * torch.eye(len(X), dtype=X.dtype)
    weights: list[float] = (own + torch.linalg.solve(normal, X @ (y - X[-1]))).tolist()
    return weights
