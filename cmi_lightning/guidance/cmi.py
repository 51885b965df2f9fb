"""Ascent of the conditional mutual information I(x₀; y | x_t)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.information import Estimator, Information, Lanczos
from cmi_lightning.linalg import norm, per_sample
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
    >>> sampler = Sampler(shipped_prior(), DDPM(), [CMI(interval=3), DPS()], num_steps=100)

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
        interval: act every ``interval``-th step.
        estimator: of I and ∇I; default: :class:`~cmi_lightning.information.Lanczos`.

    Raises:
        InputError: if an option is out of range, or the measurement has no noise (I is infinite).

    Source: Hamidi & Yang (2025), Alg. 1, which gives no step sizes.
    """

    scale: float = 0.02
    step_size: Literal["beta", "noise"] = "beta"
    max_step: float = 0.01
    min_signal: float = 0.003
    max_signal: float = 0.9
    interval: int = 1
    estimator: Estimator | None = None
    needs_noise = True

    def __post_init__(self) -> None:
        checks = {
            "step_size must be beta or noise": self.step_size in ("beta", "noise"),
            "max_step must be at least 0": self.max_step >= 0,
            "min_signal must be between 0 and max_signal": 0 <= self.min_signal <= self.max_signal,
            "max_signal must be at most 1": self.max_signal <= 1,
            "interval must be at least 1": self.interval >= 1,
        }
        for rule, kept in checks.items():
            if not kept:
                raise InputError(f"CMI.{rule}, got {getattr(self, rule.split()[0])!r}.")
        if self.estimator is None:
            object.__setattr__(self, "estimator", Lanczos())

    @property
    def derivatives(self) -> int:
        """How often x̂₀ is differentiated: as the estimator does."""
        return self.estimator.derivatives if self.estimator is not None else 0

    @property
    def active(self) -> bool:
        """Whether the scale and the longest step ≠ 0."""
        return self.scale != 0 and self.max_step != 0

    def estimate(self, step: Step) -> Information:
        """Return value and gradient of I at x_t."""
        assert self.estimator is not None  # set by __post_init__
        return self.estimator(step)

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        """Shift the mean up the gradient."""
        if not step.problem.noisy:
            raise InputError("CMI needs measurement noise: noise.sigma must be above 0.")
        alpha, sigma = step.t.alpha, step.t.sigma
        signal = alpha**2 / (alpha**2 + sigma**2)
        acts = self.min_signal <= signal <= self.max_signal
        if not acts or step.index % self.interval or step.s.sigma == 0:
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
