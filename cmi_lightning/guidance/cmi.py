"""Ascent of the conditional mutual information I(x₀; y | x_t)."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError, counted
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.information import Estimator, Information, Lanczos
from cmi_lightning.linalg import norm, per_sample
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class CMI(Guidance):
    """x_s ← x_s + η ∇_{x_t} I(x₀; y | x_t): move to where y would tell more about the image.

    I = ½ log det(1 + Σ_n^{-1/2} A Σ Aᵀ Σ_n^{-1/2}) with Σ = (σ_t²/α_t) ∂x̂₀/∂x_t; the estimators of
    I and of its gradient, with their cost, bias and variance, are those of
    :mod:`cmi_lightning.information`. Logged per acting step: the value in nats ("cmi/value"),
    ‖∇I‖ ("cmi/gradient") and the relative residual of the estimator's solve ("cmi/residual").

    The paper ascends; a negative ``scale`` descends. Which is better has to be found out: on the
    shipped priors ascent makes PSNR significantly better in at most one of 24 cells and descent in
    half or more, by narrowing the draws (docs/results.md); on mixtures, where everything is exact,
    descent takes the draws farther from the posterior and ascent changes little
    (docs/mixture.md). The defaults are the paper's sign, and cautious. Search ``scale``, zero and
    both signs included.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.guidance import DPS
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [CMI(), DPS()], num_steps=100)
    >>> sampler.guidances[0].plan()
    'at 20 of 100 steps, for 0.30 of the 200 passes without it'

    Args:
        scale: η as a share, see ``step_size``; negative to descend; 0 switches the guidance off, at
            no cost.
        step_size: "beta": η = scale·β_t of the respaced chain, so that the total drift does not
            depend on the number of steps while ``max_step`` is not reached; "noise": the step has
            the length scale·√n·std of the ancestral sampler's noise, however small ‖∇I‖ ≠ 0 is (on
            an exact prior that may be rounding).
        max_step: longest step, as a share of √n·std of the ancestral sampler's noise.
        min_signal: act where α²/(α² + σ²), which is ᾱ_t on a DDPM chain, is at least this.
        max_signal: act where it is at most this.
        interval: act every ``interval``-th step, in place of a budget.
        estimator: of I and ∇I; default: :class:`~cmi_lightning.information.Lanczos` with one Krylov
            vector and a forward difference, the largest effect per pass (docs/method.md).
        budget: network passes of all steps together, as a share of what the chain takes without
            CMI; inf acts at every step. How many steps that is follows from the estimator's passes,
            at least one; they are spread evenly over those that the signal allows. Default: 0.3, if
            no interval is given.

    Raises:
        InputError: if interval and budget are given, or the measurement has no noise (I is
            infinite).

    Source: Hamidi & Yang (2025), Alg. 1, which gives no step sizes.
    """

    scale: float = 0.02
    step_size: Literal["beta", "noise"] = "beta"
    max_step: float = number(0.01, "[0, inf]")
    min_signal: float = number(0.003, "[0, 1]")
    max_signal: float = number(0.9, "[0, 1]")
    interval: int | None = number(None, "[1, inf)")
    estimator: Estimator | None = None
    budget: float | None = number(None, "(0, inf]")
    needs_noise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_signal > self.max_signal:
            raise InputError(
                f"CMI.min_signal must be at most CMI.max_signal, got {self.min_signal} and "
                f"{self.max_signal}."
            )
        if self.budget is not None and self.interval is not None:
            raise InputError("CMI.budget and CMI.interval say the same thing twice: give one.")
        if self.estimator is None:
            object.__setattr__(self, "estimator", Lanczos(krylov=1, derivative="forward"))

    @property
    def derivatives(self) -> int:
        """How often x̂₀ is differentiated: as the estimator does."""
        return self.estimator.derivatives if self.estimator is not None else 0

    @property
    def active(self) -> bool:
        """Whether the scale and the longest step ≠ 0."""
        return self.scale != 0 and self.max_step != 0

    def allows(self, t: Level, s: Level) -> bool:
        """Whether the signal, and noise that is left, let CMI act from t to s."""
        signal = t.alpha**2 / (t.alpha**2 + t.sigma**2)
        return self.min_signal <= signal <= self.max_signal and s.sigma != 0

    def passes(self, calls: int, chain: Schedule) -> float:
        """Return 0: CMI is no base of another one."""
        return 0.0

    def for_chain(self, schedule: Schedule, passes: float) -> CMI:
        """Return it with the steps at which it acts: these are the same for every sample."""
        planned = copy(self)
        chosen = {linear: self._choose(schedule, passes, linear) for linear in (True, False)}
        vars(planned).update(_steps=chosen, _chain=(len(schedule), passes))  # no options: no fields
        return planned

    def plan(self, linear: bool = True) -> str | None:
        """Return at how many steps CMI acts, and what that costs."""
        if "_steps" not in vars(self):
            return None
        count, (steps, base) = len(vars(self)["_steps"][linear]), vars(self)["_chain"]
        text = f"at {count} of {counted(steps, 'step')}"
        if each := self._each(linear):
            share = count * each / base
            shown = f"{share:.1g}" if 0 < share < 0.01 else f"{share:.2f}"
            text += f", for {shown} of the {counted(round(base), 'pass')} without it"
        return text

    def _each(self, linear: bool) -> float | None:
        return self.estimator.passes(linear) if self.estimator is not None else None

    def _choose(self, schedule: Schedule, passes: float, linear: bool) -> frozenset[int]:
        """Return at which steps CMI acts where the others take ``passes``."""
        allowed = [index for index, t, s in schedule.pairs() if self.allows(t, s)]
        budget, each = 0.3 if self.budget is None else self.budget, self._each(linear)
        if self.interval is not None:
            return frozenset(index for index in allowed if index % self.interval == 0)
        if not allowed or budget == math.inf:
            return frozenset(allowed)
        if each is None:
            raise InputError(
                f"{type(self.estimator).__name__}.passes does not say what an estimate costs: set "
                "CMI.interval in place of a budget."
            )
        affordable = math.floor(budget * passes / each + 1e-9)  # 0.3·200/3 is 20, up to rounding
        return frozenset(spread(allowed, max(affordable, 1)))

    def _acts(self, step: Step) -> bool:
        """Whether CMI acts: as planned, or wherever it may where no sampler has planned."""
        if (steps := vars(self).get("_steps")) is not None:
            return step.index in steps[isinstance(step.problem.operator, LinearOperator)]
        return self.allows(step.t, step.s) and step.index % (self.interval or 1) == 0

    def estimate(self, step: Step) -> Information:
        """Return value and gradient of I at x_t."""
        assert self.estimator is not None  # set by __post_init__
        return self.estimator(step)

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        if not self._acts(step):
            return transition
        information = self.estimate(step)
        length = norm(information.gradient)
        noise_length = math.sqrt(step.coefficients.variance * step.x[0].numel())
        if self.step_size == "beta":
            size = self.scale * step.coefficients.beta * length
        else:
            size = torch.full_like(length, self.scale * noise_length)
        limit = self.max_step * noise_length
        factor = torch.where(length > 0, size.clamp(-limit, limit) / length, 0.0)
        step.log |= {"cmi/value": information.value, "cmi/gradient": length}
        if information.residual is not None:
            step.log["cmi/residual"] = information.residual
        return transition.shift(per_sample(factor, step.x) * information.gradient)


def spread(items: list[int], count: int) -> list[int]:
    """Return ``count`` of the items, at even distances; all of them if they are fewer.

    >>> spread([9, 8, 7, 6, 5, 4, 3, 2, 1], 3)
    [8, 5, 2]
    """
    count = min(count, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]
