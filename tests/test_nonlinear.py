"""Forward models that are not linear: derivatives, linearisation, and every guidance on them."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPE, make_step
from torch import Tensor

from cmi_lightning import InputError, PosteriorSampler, Problem, Sampler
from cmi_lightning.exact import GaussianMixture, GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM, residual_gradient
from cmi_lightning.information import Lanczos, TraceLimit
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Dense, Identity, LinearOperator, Operator, RandomMask
from cmi_lightning.solvers import DDPM


class Cubed(Operator):
    """y = x + 0.3 x³ of every second pixel; smooth, and not linear."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.flatten(1)[:, ::2]
        return half + 0.3 * half**3


class Wrapped(Operator):
    """A linear operator that does not say so."""

    def __init__(self, inner: LinearOperator) -> None:
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_derivatives_are_the_dense_ones() -> None:
    x, u, v = draw(2, *SHAPE), draw(2, *SHAPE, seed=1), draw(2, 3, seed=2)
    A = Cubed()
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: A(z)[0], x[b : b + 1])[:, 0] for b in (0, 1)]
    ).flatten(2)
    torch.testing.assert_close(A.vjp(x, v).flatten(1), (v[:, None] @ J)[:, 0])
    torch.testing.assert_close(A.jvp(x, u), (J @ u.flatten(1)[..., None])[..., 0])
    linear = A.linearize(x)
    shift = torch.tensor([0.1, 2.0], dtype=torch.float64)
    system = J @ J.mT + shift[:, None, None] * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(linear.solve(v, shift), torch.linalg.solve(system, v))
    assert linear.linearize(x) is linear
    assert linear.value is not None
    torch.testing.assert_close(linear.value, A(x))


def test_composition_follows_the_chain_rule(dense: Dense) -> None:
    x, v = draw(2, *SHAPE), draw(2, 3, seed=1)

    class Square(Operator):
        def forward(self, x: Tensor) -> Tensor:
            return x**2

    for A in (dense @ Square(), Square() @ dense, Square() @ Square()):
        assert not isinstance(A, LinearOperator)
        z = x.clone().requires_grad_()
        w = v if A(x).shape == v.shape else draw(*A(x).shape, seed=1)
        expected = torch.autograd.grad(A(z), z, w)[0]
        torch.testing.assert_close(A.vjp(x, w), expected)
        linear = A.linearize(x)
        torch.testing.assert_close((linear(x) * w).sum(), (linear.adjoint(w) * x).sum())
        assert linear.value is not None
        torch.testing.assert_close(linear.value, A(x))
    both = Dense(draw(2, 3, seed=3)) @ dense
    assert isinstance(both, LinearOperator)
    matrix = both.outer.matrix @ dense.matrix  # type: ignore[attr-defined]
    whole = Dense(matrix, SHAPE)
    torch.testing.assert_close(both.pinv(draw(2, 2)), whole.pinv(draw(2, 2)), rtol=1e-5, atol=1e-6)


def test_composition_binds_both_and_keeps_measured_entries() -> None:
    noise, x = SampleNoise(0, ["a", "b"]), draw(2, 1, 8, 8)
    problem = Problem.simulate(x, RandomMask(0.5) @ Identity(), 0.1, noise)
    alone = Problem.simulate(x, RandomMask(0.5), 0.1, noise)
    assert torch.equal(problem.y, alone.y)
    assert torch.equal(problem.operator.guess(problem.y), alone.operator.guess(alone.y))


@pytest.mark.parametrize("guidances", [[DPS()], [DSG()], [CMI(), DPS()], [PiGDM()]], ids=str)
def test_a_linear_operator_that_does_not_say_so_gives_the_same_run(
    dense: Dense, guidances: list
) -> None:
    prior = GaussianPrior(draw(*SHAPE))
    noise, x = SampleNoise(0, ["a", "b"]), draw(2, *SHAPE, seed=1)
    runs = [
        Sampler(prior, DDPM(), guidances, 20).run(
            Problem.simulate(x, operator, 0.1, noise), noise, x
        )
        for operator in (dense, Wrapped(dense))
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-6)


def test_residual_gradient_is_autograds(mixture: GaussianMixture) -> None:
    step = make_step(mixture, Cubed())
    norms = torch.linalg.vector_norm(step.problem.y - Cubed()(step.x0), dim=1)
    torch.testing.assert_close(residual_gradient(step), step.grad(norms))
    assert step.residual.requires_grad


def test_every_guidance_runs_or_refuses(mixture: GaussianMixture) -> None:
    noise, x = SampleNoise(0, ["a", "b"]), draw(2, *SHAPE)
    problem = Problem.simulate(x, Cubed(), 0.1, noise)
    for guidances in (
        [DPS()],
        [DSG()],
        [PiGDM()],
        [MomentMatching()],
        *([CMI(estimator=e(derivative=d)), DPS()] for e in (Lanczos, TraceLimit) for d in DERIVED),
    ):
        out = Sampler(mixture, DDPM(), guidances, 6).run(problem, noise, x)
        assert bool(out.isfinite().all())
    with pytest.raises(InputError, match="MCG needs a linear operator and Cubed is none; use"):
        Sampler(mixture, DDPM(), [MCG()], 6).run(problem, noise, x)
    with pytest.raises(InputError, match="MCG needs a linear operator"):
        PosteriorSampler(mixture, Cubed(), guidances=[MCG()])


DERIVED = ("autograd", "difference")


def test_information_is_that_of_the_linearised_operator(mixture: GaussianMixture) -> None:
    """Exact with every Krylov dimension, and equal to the dense value of A' = ∂A/∂x at x̂₀."""
    step = make_step(mixture, Cubed())
    estimate = Lanczos(probes=400, krylov=3)(step)
    for row in range(2):
        J = torch.autograd.functional.jacobian(
            lambda z: mixture(z[None], step.t).x0.flatten(), step.x[row].detach()
        ).reshape(6, 6)
        A = torch.autograd.functional.jacobian(
            lambda z: Cubed()(z[None])[0], step.x0[row].detach()
        ).reshape(3, 6)
        S = torch.eye(3) + A @ (step.covariance_factor * J) @ A.mT / 0.01
        exact = 0.5 * torch.logdet(S)
        assert float(estimate.value[row]) == pytest.approx(float(exact), rel=0.05)


# What is refused.


class Mixing(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Spread(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean().sqrt()


class Infinite(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Short(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


class Detached(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().detach()


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (Mixing(), "Mixing mixes the images of a batch"),
        (Spread(), "Spread mixes the images of a batch"),
        (Infinite(), "Infinite gives values that are no numbers"),
        (Short(), "Short maps 2 images to .* one row an image"),
        (Detached(), "Detached is not differentiable: its result has no gradient. Write"),
    ],
)
def test_operators_that_cannot_be_used(
    mixture: GaussianMixture, operator: Operator, words: str
) -> None:
    noise, x = SampleNoise(0, ["a", "b"]), draw(2, *SHAPE)
    with pytest.raises(InputError, match=words):
        Sampler(mixture, DDPM(), [DPS()], 6).run(
            Problem.simulate(x, operator, 0.1, noise), noise, x
        )
    with pytest.raises(InputError, match=words):
        Sampler(mixture, DDPM(), [DPS()], 6).run(Problem(x, operator, 0.1), noise, x)


def test_operators_are_bound_where_they_meet_images(mixture: GaussianMixture) -> None:
    noise, x = SampleNoise(0, ["a", "b"]), draw(2, *SHAPE)
    sampler = Sampler(mixture, DDPM(), [DPS()], 6)
    problem = Problem.simulate(x, RandomMask(0.5), 0.1, noise)
    unbound = Problem(problem.y, RandomMask(0.5), 0.1)
    assert torch.equal(sampler.run(unbound, noise, x), sampler.run(problem, noise, x))
