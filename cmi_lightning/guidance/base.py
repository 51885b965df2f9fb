"""The contract of a guidance: three places where a sampler can be edited."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cmi_lightning.checked import Checked
from cmi_lightning.errors import InputError, wording
from cmi_lightning.linalg import unit
from cmi_lightning.operators.base import LinearOperator, Operator
from cmi_lightning.schedule import Schedule
from cmi_lightning.step import Step, Transition

# What each hook edits.
HOOKS = {
    "guide_denoised": "x̂₀",
    "guide_transition": "the mean of a step",
    "guide_sample": "x_s",
}
NONLINEAR = "DPS, DSG, PiGDM, MomentMatching or DAPS"  # as docs/methods.md has them


class Guidance(Checked, ABC):
    """Steers a solver towards the measurement. Override the one hook that the method edits.

    x_t → x̂₀ → :meth:`guide_denoised` → solver → :meth:`guide_transition` → x_s →
    :meth:`guide_sample`. Everything a hook returns must be per sample: row b may depend on row b of
    its inputs only. Options are checked, see :class:`~cmi_lightning.checked.Checked`.

    >>> class Nudge(Guidance):
    ...     differentiable = False
    ...     def guide_denoised(self, step, x0):
    ...         return x0 + 0.1 * step.linearized.adjoint(step.residual)
    >>> import torch
    >>> from cmi_lightning import Problem, Sampler
    >>> from cmi_lightning.exact import GaussianPrior
    >>> from cmi_lightning.noise import SampleNoise
    >>> from cmi_lightning.operators import Identity
    >>> from cmi_lightning.solvers import DDPM
    >>> x, noise = torch.zeros(1, 2), SampleNoise(0, ["a"])
    >>> sampler = Sampler(GaussianPrior(x[0]), DDPM(), [Nudge()], num_steps=10)
    >>> sampler.run(Problem(x, Identity(), 0.1), noise, x).shape
    torch.Size([1, 2])

    Attributes:
        differentiable: the guidance asks for gradients with respect to x_t.
        stochastic: the guidance needs a solver that injects noise.
        needs_noise: the guidance needs measurements with noise.
        needs_linear: the guidance needs a linear operator; others take :attr:`Step.linearized`.
        needs_latent: the guidance needs a prior of latents.
    """

    # Without annotations: jsonargparse would look up their names in a subclass's module, and check
    # none of the subclass's options where it lacks one.
    differentiable = True
    stochastic = False
    needs_noise = False
    needs_linear = False
    needs_latent = False

    @property
    def derivatives(self) -> int:
        """How often the guidance differentiates x̂₀: 0, 1 or 2 times."""
        return int(self.differentiable)

    @property
    def hooks(self) -> set[str]:
        """Names of the hooks that the guidance overrides."""
        return {hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Guidance, hook)}

    @property
    def active(self) -> bool:
        """False if the guidance leaves every step as it is; it is then skipped, at no cost."""
        return True

    def passes(self, calls: int, chain: Schedule) -> float:
        """Return the network passes of a chain, beyond the x̂₀ that the solver asks for.

        Args:
            calls: how often the hook is called: once a step, or once an x̂₀ if it edits that.
            chain: the levels.
        """
        return calls * self.differentiable

    def for_chain(self, schedule: Schedule, passes: float) -> Guidance:
        """Return the guidance as it acts on a chain; called before sampling starts.

        Args:
            schedule: the chain's levels.
            passes: network passes of a walk down the chain without this guidance.

        Raises:
            InputError: to refuse the chain.
        """
        return self

    def plan(self, linear: bool = True) -> str | None:
        """Return what the guidance does on its chain, for people.

        Args:
            linear: whether A is.
        """
        return None

    def guide_denoised(self, step: Step, x0: Tensor) -> Tensor:
        """Return the x̂₀ (B, *) that the solver shall use."""
        return x0

    def guide_transition(self, step: Step, transition: Transition) -> Transition:
        """Return the edited proposal for x_s."""
        return transition

    def guide_sample(self, step: Step, x: Tensor) -> Tensor:
        """Return the edited x_s (B, *)."""
        return x


def residual_gradient(step: Step) -> Tensor:
    """Return ∇_{x_t} ‖y − A(x̂₀)‖ = −Jᵀ A'ᵀ r/‖r‖ per sample (B, *), with r = y − A(x̂₀).

    Where each measurement has its own noise level σᵢ, the norm is that of r ⊙ σ̄/σ, with σ̄ the root
    mean square of the sample's σ: what is measured well counts more, and ζ keeps its unit.
    """
    r, w = step.residual.detach(), step.problem.relative_std
    direction = unit(r) if w is None else unit(r / w) / w
    return -step.vjp(step.linearized.adjoint(direction))


def refuse_unfit(parts: Iterable[Any], operator: Operator, noisy: bool = True) -> None:
    """Refuse a guidance or solver that needs a linear operator, or noise, where there is none."""
    for part in parts:
        name = type(part).__name__
        if part.needs_linear and not isinstance(operator, LinearOperator):
            raise InputError(
                f"{name} needs a linear operator and {type(operator).__name__} is none; use "
                f"{NONLINEAR}."
            )
        if part.needs_noise and not noisy:
            remedy = wording("set model.noise.sigma above 0", "give a sigma above 0")
            raise InputError(f"{name} needs measurement noise: {remedy}.")
