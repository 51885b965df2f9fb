"""What every estimator shares: the whitened system, probes, and the derivative of Σ."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmi_lightning.checked import Checked, number
from cmi_lightning.errors import warn_once
from cmi_lightning.linalg import dot, norm, per_sample
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.step import Step

# Length of the central difference's step, see contraction(). Its truncation grows with the square,
# and low precision's rounding falls with the inverse: `benchmarks/estimators.py steps` measures
# both on the shipped prior, docs/method.md has the table.
STEP_LENGTH = 0.03
# What a second-order pass costs, in forwards: measured on the shipped networks (docs/speed.md).
SECOND_ORDER = 4.0
# Passes of a contraction and of the curvature of a nonlinear A, beyond the products that are known.
CONTRACTIONS = {"autograd": 1 + SECOND_ORDER, "difference": 4.0, "forward": 2.0}
CURVATURE = 3
# What PyTorch says of what it cannot differentiate twice: fused attention, compiled networks.
TWICE = re.compile("not implemented|differentiate twice|double backward")


class Information(NamedTuple):
    """What one estimate of the conditional mutual information gives, per sample.

    >>> Information(torch.zeros(1), torch.zeros(1, 3)).residual is None
    True

    Attributes:
        value: I(x₀; y | x_t) in nats, (B,).
        gradient: ∇_{x_t} I, (B, *).
        residual: ‖S w − v‖/‖v‖ of the estimator's solve as the recursion has it, (B,); exact where
            S is symmetric and above the noise. None for estimators that solve nothing.
    """

    value: Tensor
    gradient: Tensor
    residual: Tensor | None = None


class Estimator(Checked, ABC):
    """Estimates I(x₀; y | x_t) and ∇_{x_t} I at a step, per sample.

    With x₀ | x_t taken as Gaussian of covariance Σ = (σ_t²/α_t) ∂x̂₀/∂x_t (Tweedie's formula),

        I = ½ log det S,  S = 1 + Σ_n^{-1/2} A Σ Aᵀ Σ_n^{-1/2},  ∇I = ½ tr(S⁻¹ ∇S).

    For a nonlinear A, A stands for A' = ∂A/∂x at x̂₀ in I. The estimators with probes in measurement
    space then take the change of A' into ∇I, and those in image space hold it fixed.

    This is the paper's ½ log det Σ − ½ log det (Σ⁻¹ + Aᵀ Σ_n⁻¹ A)⁻¹, and its gradient the paper's
    ½ [tr(Σ⁻¹ ∇Σ) − tr(Σ_y⁻¹ ∇Σ_y)], by Woodbury's identity: Σ is never inverted. Options are
    checked, see :class:`~cmi_lightning.checked.Checked`.

    >>> class Nothing(Estimator):
    ...     derivatives = 0
    ...     def __call__(self, step):
    ...         return Information(step.x.new_zeros(len(step.x)), torch.zeros_like(step.x))
    >>> from cmi_lightning.guidance import CMI
    >>> CMI(estimator=Nothing()).derivatives
    0

    Source: Hamidi & Yang (2025), Theorems 1 and 2.
    """

    @property
    @abstractmethod
    def derivatives(self) -> int:
        """How often the estimator differentiates x̂₀: 1 or 2 times."""

    def passes(self, linear: bool = True) -> float | None:
        """Return what an estimate costs beyond x̂₀, in network passes; None if that is not known.

        A forward and a vector-Jacobian product count as one each, a second-order pass as
        ``SECOND_ORDER``.

        Args:
            linear: whether A is.
        """
        return None

    @abstractmethod
    def __call__(self, step: Step) -> Information:
        """Return value and gradient of I at x_t. Measurements must carry noise."""


@dataclass(frozen=True)
class ProbeEstimator(Estimator):
    """Averages an estimate over random sign vectors, E[v vᵀ] = 1.

    >>> from cmi_lightning.information import TraceLimit
    >>> TraceLimit().derivatives, TraceLimit(derivative="difference").derivatives
    (2, 1)

    Args:
        probes: sign vectors per step; the variance falls as 1/probes.
        derivative: "autograd" differentiates Jᵀu once more and is exact; "difference" takes a
            central difference of two vector-Jacobian products, for less memory; "forward" the
            difference of one from the product at x_t, which the estimate has anyway: the fewest
            passes. Networks without second derivatives (fused attention, ``torch.compile``) get the
            central difference in place of "autograd".
    """

    curved = False  # without annotation: no option; whether ∇I has what a nonlinear A' changes
    probes: int = number(1, "[1, inf)")
    derivative: Literal["autograd", "difference", "forward"] = "autograd"

    @property
    def derivatives(self) -> int:
        """How often x̂₀ is differentiated: twice by autograd, once by a difference."""
        return 2 if self.derivative == "autograd" else 1

    @property
    def products(self) -> int | None:
        """Vector-Jacobian products of a probe beside its contraction's; None if not known."""
        return None

    def passes(self, linear: bool = True) -> float | None:
        """Return the passes of all probes; see ``CONTRACTIONS`` and :func:`curvature`."""
        if self.products is None:
            return None
        bent = CURVATURE if self.curved and not linear else 0
        return self.probes * (self.products + CONTRACTIONS[self.derivative] + bent)

    @abstractmethod
    def probe(self, step: Step, draw: Callable[[Tensor], Tensor]) -> Information:
        """Return the estimate from one probe.

        Args:
            step: where.
            draw: fills a tensor like the one given with the samples' random signs.
        """

    def __call__(self, step: Step) -> Information:
        """Return value and gradient of I at x_t, averaged over the probes."""
        parts = [
            self.probe(step, partial(step.noise.signs, f"cmi/{k}", step.index))
            for k in range(self.probes)
        ]
        value, gradient = (
            torch.stack(x).mean(0) for x in zip(*(p[:2] for p in parts), strict=True)
        )
        residuals = [p.residual for p in parts if p.residual is not None]
        return Information(value, gradient, torch.stack(residuals).mean(0) if residuals else None)

    def contraction(
        self, step: Step, u: Tensor, p: Tensor, here: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Return ∇_{x_t} ⟨u, Σ p⟩ (B, *) at fixed u and p; see :func:`contraction`.

        A network without second derivatives gets a difference of first ones, and a warning.
        """
        if self.derivative == "autograd":
            if step.denoiser.derivatives > 1:
                cost = replace(step.cost)
                try:
                    return contraction(step, u, p)
                except RuntimeError as error:
                    if not TWICE.search(str(error)):
                        raise
                vars(step.cost).update(vars(cost))
                step.denoiser.derivatives = 1
            warn_once(
                "The network has no second derivative (fused attention, for example): CMI takes "
                "differences of its first ones."
            )
        way = "forward" if self.derivative == "forward" else "difference"
        known = here() if here and way == "forward" else None
        if step.last and self.probes == 1 and isinstance(step.problem.operator, LinearOperator):
            step.release()  # nobody needs it: the graph at x + h p may have its memory
        return contraction(step, u, p, way, here=known)


@dataclass
class Whitened:
    """v ↦ S v = v + std⁻¹ A Σ Aᵀ std⁻¹ v on measurements (B, *m).

    One vector-Jacobian product an application: Σ is applied as (σ_t²/α_t) Jᵀ, which on an exact
    prior is the same.

    Attributes:
        step: where.
        std: standard deviations of the noise, broadcastable to y.
        pulled: Jᵀ Aᵀ std⁻¹ v (B, *) of every v so far: their combinations need no pass.
    """

    step: Step
    std: Tensor
    pulled: list[Tensor] = field(default_factory=list)

    def __call__(self, v: Tensor) -> Tensor:
        """Return S v."""
        A = self.step.linearized
        self.pulled.append(self.step.vjp(A.adjoint(v / self.std)))
        return v + self.step.covariance_factor / self.std * A(self.pulled[-1])


def contraction(
    step: Step,
    u: Tensor,
    p: Tensor,
    derivative: str = "autograd",
    length: float = STEP_LENGTH,
    here: Tensor | None = None,
) -> Tensor:
    """Return ∇_{x_t} ⟨u, Σ p⟩ = (σ_t²/α_t) ∇_{x_t} ⟨u, J p⟩ (B, *) at fixed u and p (B, *).

    "autograd": one vector-Jacobian product with graph and one second-order pass. "difference":
    (J(x + h p)ᵀu − J(x − h p)ᵀu)/2h, two forwards and two products; mixed partial derivatives
    commute, so J need not be symmetric (the roles of u and p may not be exchanged if it is not).
    "forward": (J(x + h p)ᵀu − J(x)ᵀu)/h, one forward and one product, and J(x)ᵀu.
    The step h p has the length ``length``·σ_t·√n: x̂₀ changes on the scale of the noise σ_t, and the
    product's rounding is divided by it.

    Args:
        step: where.
        u: cotangent (B, *).
        p: direction (B, *).
        derivative: "autograd", "difference" or "forward".
        length: root mean square of h p, in units of σ_t.
        here: J(x)ᵀu (B, *) for "forward"; None takes one more product.
    """
    if derivative == "autograd":
        return step.covariance_factor * step.grad(dot(step.vjp(u, create_graph=True), p))
    x = step.x.detach()
    size = length * step.t.sigma * math.sqrt(x[0].numel())
    length_p = norm(p)
    h = size / torch.where(length_p > 0, length_p, 1.0)  # nothing measured: p = 0, and no gradient
    if derivative == "forward":
        here = step.vjp(u) if here is None else here
        ahead = step.at(x + per_sample(h, x) * p, step.t).vjp(u)
        return step.covariance_factor * (ahead - here) / per_sample(h, x)
    ahead, behind = (step.at(x + per_sample(s * h, x) * p, step.t).vjp(u) for s in (1, -1))
    return step.covariance_factor * (ahead - behind) / per_sample(2 * h, x)


def curvature(step: Step, w: Tensor, v: Tensor, u: Tensor, p: Tensor) -> Tensor | None:
    """Return ∇_{x_t} ⟨w, A' Σ A'ᵀ v⟩ (B, *) by what A' = ∂A/∂x at x̂₀ changes, Σ held fixed.

    None, at no cost, for A of linear pieces. It is Jᵀ ∇_{x̂₀} (⟨A'ᵀ w, Σ p⟩ + ⟨A'ᵀ v, Σ u⟩): three
    vector-Jacobian products of the network, and second derivatives of A. :func:`contraction` has
    the other part.

    Args:
        step: where.
        w: (B, *m), and v: (B, *m), held fixed.
        v: see w.
        u: A'ᵀ w (B, *).
        p: A'ᵀ v (B, *).
    """
    if isinstance(step.problem.operator, LinearOperator):
        return None
    with torch.enable_grad():
        x0 = step.x0.detach().requires_grad_()
        y = step.problem.operator(x0)
        pulled = [torch.autograd.grad(y, x0, z, create_graph=True)[0] for z in (w, v)]
    if not any(z.requires_grad for z in pulled):
        return None  # A' is the same nearby
    right, left = (step.covariance_factor * step.vjp(direction) for direction in (p, u))
    with torch.enable_grad():
        products = dot(pulled[0], right) + dot(pulled[1], left)
        (change,) = torch.autograd.grad(products.sum(), x0, allow_unused=True)
    return torch.zeros_like(u) if change is None else step.vjp(change)


def clipped_inverse(values: Tensor) -> Tensor:
    """Return f'(λ) = 1/λ for λ > 1, else 0: the inverse of S above the noise."""
    return torch.where(values > 1, 1 / values.clamp_min(1), 0.0)


def clipped_log(values: Tensor) -> Tensor:
    """Return f(λ) = log max(λ, 1)."""
    return values.clamp_min(1).log()
