"""LLE's coefficients, by least squares along the chain."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmi_lightning.guidance.base import Guidance
from cmi_lightning.guidance.lle import LLE, combined, history, projected
from cmi_lightning.step import Step

RIDGE = 1e-4  # towards the method itself, as a share of the mean square of its x̂₀


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
        past = history(step, x0)
        seen = torch.stack([projected(step, x) for x in past], 0)
        truth = projected(step, self.truth)
        a = _fit(seen, truth)
        b = _fit(torch.stack(past, 0) - seen, self.truth - truth)
        self.seen.append(a)
        self.unseen.append(b)
        return combined(step, past, a, b)

    def coefficients(self) -> LLE:
        """Return the guidance that was found."""
        return LLE([*self.seen], [*self.unseen])


def _fit(parts: Tensor, truth: Tensor) -> list[float]:
    """Return the weights (k,) of the parts (k, B, *) whose sum is nearest to the truth (B, *)."""
    X, y = parts.flatten(1).cpu().double(), truth.flatten().cpu().double()
    gram = X @ X.mT
    own = torch.eye(len(X), dtype=X.dtype)[-1]  # the method itself
    ridge = RIDGE * gram[-1, -1].clamp_min(torch.finfo(X.dtype).tiny)
    normal = gram + ridge * torch.eye(len(X), dtype=X.dtype)
    weights: list[float] = (own + torch.linalg.solve(normal, X @ (y - X[-1]))).tolist()
    return weights
