"""Coupled data and measurement space diffusion."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.guidance.base import Guidance
from cmi_lightning.step import Step, Transition


@dataclass(frozen=True)
class CDPS(Guidance):
    """C-DPS: x_s is drawn from the solver's N(m, v) given y_s, a diffusion of the measurement.

    With x_s = α_s x₀ + σ_s z and y_s = α_s y + σ_s A z, y_s = A x_s + α_s n. So
    x_s ~ N(m, v)·N(y_s; A ·, α_s² Σ_n), an exact draw by one perturbed solve. No step size, no
    gradient of the network. The last step adds no noise and is not moved.

    N(m, v) leaves out the spread of x₀ | x_t, so that the posterior mean is off by about a fifth of
    a standard deviation even on Gaussian priors. Where y has no noise this is MCG(scale=0) but for
    the last step; with particles it is :class:`cmi_lightning.solvers.FPS`.

    The authors' code is not public, and their text was not at hand: this is derived from the
    abstract. They solve by conjugate gradients, pre-whitened; the law is the same.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.denoisers import shipped_prior
    >>> from cmi_lightning.solvers import DDPM
    >>> sampler = Sampler(shipped_prior(), DDPM(), [CDPS()], num_steps=100)

    Args:
        fresh: share of new noise in every y_s: 1 draws it anew, 0 keeps one z for the chain.

    Raises:
        InputError: if the solver's variance is not one number.

    Source: Hamidi, Yang & Liang (2025).
    """

    fresh: float = number(1.0, "[0, 1]")
    differentiable = False
    stochastic = True
    needs_linear = True

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        y_s, std = noised_measurement(step, "cdps", self.fresh), transition.std
        if isinstance(std, Tensor):
            raise InputError("CDPS needs one variance for all pixels: set solver.variance=small.")
        if std == 0:
            return transition
        scaled = step.s.alpha * step.problem.noise_std
        problem = replace(step.problem, y=y_s, noise_std=scaled)
        n = step.measurement_normal("cdps/measurement")
        mean = problem.prox(transition.mean, std**2)
        drawn = problem.draw(transition.mean, std**2, transition.noise, n)
        return replace(transition, mean=mean, noise=(drawn - mean) / std)


def noised_measurement(step: Step, name: str, fresh: float) -> Tensor:
    """Return y_s = α_s y + σ_s A z (B, *m), and keep it in the step's memory as "name/y".

    Its noise is √(1 − c) of the last one's and √c of a new one's, c = ``fresh``.
    """
    A, y, t, s = step.linearized, step.problem.y, step.t, step.s
    noise = A(step.normal(f"{name}/noise"))
    if (y_t := step.memory.get(f"{name}/y")) is not None:
        noise = (1 - fresh) ** 0.5 * (y_t - t.alpha * y) / t.sigma + fresh**0.5 * noise
    y_s = step.memory[f"{name}/y"] = s.alpha * y + s.sigma * noise
    return y_s
