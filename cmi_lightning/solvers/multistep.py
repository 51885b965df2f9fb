"""DPM-Solver++: multistep solvers in x̂₀ and log α/σ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cmi_lightning.checked import number
from cmi_lightning.solvers.base import GuidedX0, Solver
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class DPMSolver(Solver):
    """DPM-Solver++(2M): x̂₀ is extrapolated from this step and the last one.

    With λ = log α/σ, h = λ_s − λ_t, h₋ = λ_t − λ_before and D = (h/h₋)(x̂₀ − x̂₀ before):

    - "midpoint": x_s = (σ_s/σ_t) x_t + α_s (1 − e⁻ʰ)(x̂₀ + D/2);
    - "heun": x_s = (σ_s/σ_t) x_t + α_s [(1 − e⁻ʰ) x̂₀ + (h − 1 + e⁻ʰ) D/h], the exact integral;
    - "sde": x_s = (σ_s/σ_t) e⁻ʰ x_t + α_s (1 − e⁻²ʰ)(x̂₀ + D/2) + σ_s √(1 − e⁻²ʰ) z.

    D = 0 in the first step, and in the last, which ends at x̂₀. Of order 1 it is DDIM(0), and "sde"
    DDPM. Guidances of x̂₀ enter the history and keep the order; those that move x_s (DPS, MCG, DSG,
    CMI) lower it to 1. One evaluation a step; 10 to 25 steps do.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> sampler = Sampler(shipped_prior(), DPMSolver(), num_steps=20)

    Args:
        kind: which of the three.
        order: 1 or 2.

    Source: Lu et al. (2022), DPM-Solver++, Alg. 2.
    """

    kind: Literal["midpoint", "heun", "sde"] = "midpoint"
    order: int = number(2, "[1, 2]")

    @property
    def stochastic(self) -> bool:
        """Whether the kind is "sde"."""
        return self.kind == "sde"

    def transition(self, step: Step, guided_x0: GuidedX0) -> Transition:
        """Return the extrapolated step, and remember x̂₀."""
        x0, t, s, z = guided_x0(step), step.t, step.s, step.normal("solver")
        before = step.memory.get("dpm/x0")
        step.memory["dpm/x0"] = x0
        if s.sigma == 0:
            return Transition(x0, 0.0, z)

        def log_snr(level: tuple[float, float, float]) -> float:
            return math.log(level[0] / level[1])

        h, slope = log_snr(s) - log_snr(t), 0.0 * x0
        last = log_snr(t) - log_snr(step.previous) if step.previous else 0.0
        if self.order == 2 and before is not None and last > 0:
            slope = h / last * (x0 - before)
        if self.kind == "sde":
            gain = -math.expm1(-2 * h)
            mean = s.sigma / t.sigma * math.exp(-h) * step.x.detach()
            mean = mean + s.alpha * gain * (x0 + slope / 2)
            return Transition(mean, s.sigma * math.sqrt(gain), z)
        gain = -math.expm1(-h)
        share = 0.5 * gain if self.kind == "midpoint" else (h - gain) / h if h > 0 else 0.0
        mean = s.sigma / t.sigma * step.x.detach() + s.alpha * (gain * x0 + share * slope)
        return Transition(mean, 0.0, z)
