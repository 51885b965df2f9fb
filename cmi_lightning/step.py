"""One reverse step x_t → x_s: what guidances see, and the transition that they edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from cmi_lightning.denoisers.base import Denoiser, Prediction
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, PosteriorCoefficients, reverse_coefficients


@dataclass
class Cost:
    """What a run has asked of the network, in passes over a batch.

    >>> Cost(forwards=2)
    Cost(forwards=2, vjps=0, second_order=0)

    Attributes:
        forwards: evaluations.
        vjps: vector-Jacobian products, first and second order.
        second_order: those among them that differentiated another one.
    """

    forwards: int = 0
    vjps: int = 0
    second_order: int = 0


@dataclass(frozen=True)
class Transition:
    """The proposal x_s = mean + std·noise, kept in parts so that each can be edited alone.

    >>> proposal = Transition(torch.zeros(1, 2), 0.5, torch.ones(1, 2))
    >>> proposal.shift(torch.ones(1, 2)).sample()
    tensor([[1.5000, 1.5000]])

    Attributes:
        mean: (B, *).
        std: a number, or (B, *) where the network has learned the variance.
        noise: (B, *), standard normal unless a guidance replaced it.
    """

    mean: Tensor
    std: float | Tensor
    noise: Tensor

    def shift(self, d: Tensor) -> Self:
        """Return the transition with d (B, *) added to its mean."""
        return replace(self, mean=self.mean + d)

    def sample(self) -> Tensor:
        """Return x_s."""
        return self.mean + self.std * self.noise


@dataclass(eq=False)
class Step:
    """Everything known at x_t. The network runs once, when x̂₀ is first asked for.

    >>> from cmi_lightning.exact import GaussianPrior
    >>> from cmi_lightning.operators import Identity
    >>> prior, noise, x = GaussianPrior(torch.zeros(2)), SampleNoise(0, ["a"]), torch.ones(1, 2)
    >>> t, s = prior.schedule[500], prior.schedule[499]
    >>> step = Step(500, x, t, s, Problem(x, Identity(), 0.1), prior, noise)
    >>> torch.allclose(step.vjp(x), torch.full((1, 2), t.alpha))  # x̂₀ = α x_t for p(x₀) = N(0, 1)
    True

    Attributes:
        index: position in the respaced chain, N−1 … 0.
        x: x_t (B, *); a leaf of the graph where ``differentiable``.
        t: its noise level.
        s: the next lower level.
        problem: y, A and the noise level.
        denoiser: the prior.
        noise: random numbers of the samples.
        differentiable: keep the graph of x̂₀, because some guidance asks for gradients.
        cost: counts of network passes, shared by the whole run.
        log: per-sample quantities (B,) that guidances report, by name.
        memory: tensors (B, *) that solvers and guidances keep from step to step, by name.
        previous: the level of the step before; None at the first, and after the chain has gone up.
        visit: how often the chain has been at this level before.
        num_steps: N.
        last: no guidance that comes later in this step asks for products at x_t.
    """

    index: int
    x: Tensor
    t: Level
    s: Level
    problem: Problem
    denoiser: Denoiser
    noise: SampleNoise
    differentiable: bool = True
    cost: Cost = field(default_factory=Cost)
    log: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    previous: Level | None = None
    visit: int = 0
    num_steps: int = 0
    last: bool = False

    def __post_init__(self) -> None:
        self._products_with_graph = False
        self.x = self.x.detach().requires_grad_(self.differentiable)

    @cached_property
    def prediction(self) -> Prediction:
        """The network's output at x_t, with its graph where ``differentiable``."""
        self.cost.forwards += 1
        with torch.set_grad_enabled(self.differentiable):
            return self.denoiser(self.x, self.t)

    @property
    def x0(self) -> Tensor:
        """x̂₀ = E[x₀ | x_t] (B, *), not clamped."""
        return self.prediction.x0

    @cached_property
    def linearized(self) -> LinearOperator:
        """∂A/∂x at x̂₀: A itself where it is linear."""
        return self.problem.operator.linearize(self.x0)

    @cached_property
    def residual(self) -> Tensor:
        """y − A(x̂₀) (B, *m), with its graph; its norm is logged."""
        value = self.linearized.value if self.differentiable else None
        r = self.problem.y - (self.problem.operator(self.x0) if value is None else value)
        self.log["residual"] = norm(r.detach())
        return r

    @cached_property
    def coefficients(self) -> PosteriorCoefficients:
        """The exact Gaussian transition between the two levels."""
        return reverse_coefficients(self.t, self.s)

    @property
    def covariance_factor(self) -> float:
        """σ_t²/α_t, for which Cov[x₀ | x_t] = (σ_t²/α_t) ∂x̂₀/∂x_t (Tweedie's formula)."""
        return self.t.sigma**2 / self.t.alpha

    def release(self) -> None:
        """Free the graph of x̂₀, so that another one takes its place in memory."""
        self.prediction = self.prediction.map(Tensor.detach)
        if "residual" in vars(self):
            self.residual = self.residual.detach()

    def vjp(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """Return Jᵀ v with J = ∂x̂₀/∂x_t, for v (B, *); a graph that was freed is made again."""
        if self.differentiable and self.x0.grad_fn is None:
            del self.prediction
        self.cost.vjps += 1
        self._products_with_graph = self._products_with_graph or create_graph
        (product,) = torch.autograd.grad(
            self.x0, self.x, v, retain_graph=True, create_graph=create_graph
        )
        return product

    def grad(self, value: Tensor) -> Tensor:
        """Return ∇_{x_t} of per-sample scalars (B,) that were computed from x̂₀."""
        self.cost.vjps += 1
        self.cost.second_order += self._products_with_graph
        self._products_with_graph = False
        return torch.autograd.grad(value.sum(), self.x, retain_graph=True)[0]

    def normal(self, stream: str, like: Tensor | None = None) -> Tensor:
        """Return this step's standard normal noise of a stream, shaped like x_t or ``like``."""
        stream = f"{stream}~{self.visit}" if self.visit else stream
        return self.noise.normal(stream, self.index, self.x if like is None else like).detach()

    def measurement_normal(self, stream: str) -> Tensor:
        """Return standard normal noise of a stream, one number a measurement (B, *m)."""
        A, y = self.problem.operator, self.problem.y
        return A.sample_noise(lambda like: self.normal(stream, like), y)

    def at(self, x: Tensor, level: Level) -> Step:
        """Return the same step seen from another point and noise level.

        It reads this step's memory and leaves it as it is.
        """
        return replace(self, x=x, t=level, log={}, memory=dict(self.memory))


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Record:
    """What an observer sees of a finished step; holds no graph.

    >>> from cmi_lightning import Sampler
    >>> from cmi_lightning.exact import GaussianPrior
    >>> from cmi_lightning.operators import Identity
    >>> from cmi_lightning.solvers import DDIM
    >>> x, noise = torch.zeros(1, 2), SampleNoise(0, ["a"])
    >>> sampler = Sampler(GaussianPrior(torch.zeros(2)), DDIM(), num_steps=3)
    >>> [(r.index, r.forwards) for r in sampler.iterate(Problem(x, Identity(), 0.1), noise, x)]
    [(2, 1), (1, 2), (0, 3)]

    Attributes:
        index: position in the respaced chain, N−1 … 0.
        num_steps: N.
        ids: sample ids, one per row.
        t: its noise level.
        s: the next lower level.
        x: x_s (B, *).
        x0: x̂₀ of x_t (B, *), not clamped.
        log: per-sample quantities (B,) by name: "residual" ‖y − A x̂₀‖; ‖change‖ that a guidance
            made to x̂₀, the proposal or x_s, as "denoised/…", "step/…", "sample/…"; "cmi/…".
        forwards: network evaluations so far.
        vjps: vector-Jacobian products so far, first and second order.
        second_order: of these, second-order passes.
        stopped: 0 for samples that are well (B,); n > 0 where x_s was not a number at the n-th
            step, −n where the residual had diverged. Their x stays what it was before, and their
            log is NaN from then on.
        decode: makes images of x and x0, which are latents under a prior of latents; the last
            record's x is an image already.
    """

    index: int
    num_steps: int
    ids: Sequence[str]
    t: Level
    s: Level
    x: Tensor
    x0: Tensor
    log: dict[str, Tensor]
    forwards: int
    vjps: int
    second_order: int
    stopped: Tensor
    decode: Callable[[Tensor], Tensor] = _same

    @property
    def image(self) -> Tensor:
        """x̂₀ as an image (B, C, H, W)."""
        return self.decode(self.x0)
