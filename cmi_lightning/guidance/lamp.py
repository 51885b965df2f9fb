"""LAMP: a memory of the last data-consistent x̂₀."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step


@dataclass(frozen=True)
class LAMP(Guidance):
    """x̂₀ ← (1 − b) x̂₀ + b x̂₀₋, b = −γ (1 − (1 + h) e⁻ʰ)/h₋; put it after the other guidances.

    x̂₀₋ is the x̂₀ that the guidances before this one gave at the last level, λ = log α/σ, h = λ_s −
    λ_t and h₋ = λ_t − λ_before. γ < 0 averages with the past, the opposite of a multistep solver's
    extrapolation (γ = 1 is not 2M: that has h − 1 + e⁻ʰ). b is 0 in the first ``warmup`` steps and
    in the last one, and at most 1. Published with ``Renoise(0.0, network=True)``. It costs no pass.

    The formula is that of the first author's code for tomography; the paper's values for images
    could not be read.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.guidance import DDNM
    >>> from cmi_lightning.solvers import Renoise
    >>> sampler = Sampler(shipped_prior(), Renoise(0.0, True), [DDNM(), LAMP()], num_steps=50)

    Args:
        gamma: γ.
        warmup: steps that are left alone, at least 1.

    Source: LAMP (arXiv 2605.12573, 2026), as in the code for tomography.
    """

    gamma: float = -6.0
    warmup: int = number(3, "[1, inf)")
    differentiable = False

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        before = step.memory.get("lamp/x0")
        step.memory["lamp/x0"] = x0.detach()
        warm = step.num_steps - step.index > self.warmup
        if before is None or step.previous is None or step.s.sigma == 0 or not warm:
            return x0
        here, there, past = (math.log(v.alpha / v.sigma) for v in (step.t, step.s, step.previous))
        h, last = there - here, here - past
        if last <= 0:
            return x0
        b = min(-self.gamma * (1 - (1 + h) * math.exp(-h)) / last, 1.0)
        return (1 - b) * x0 + b * before
