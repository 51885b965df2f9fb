"""Guidances and solvers against closed forms."""

import math

import pytest
import torch
from conftest import SHAPE, jacobian, make_step, numbered

from cmi_lightning.errors import InputError
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import (
    CADPS,
    CMI,
    DPS,
    DSG,
    MCG,
    TMPD,
    Discrepancy,
    MomentMatching,
    PiGDM,
    ReSample,
)
from cmi_lightning.linalg import norm, unit
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import reverse_coefficients
from cmi_lightning.solvers import DDIM, DDPM, FPS, Heun, Solver
from cmi_lightning.step import Step


def proposal_of(step: Step):
    return DDPM().transition(step, lambda s: s.x0.detach())


def dense_residual_gradient(step, prior, operator, row):
    """∇ ‖y − A x̂₀‖ from a dense Jacobian."""
    J = jacobian(step, prior, row).detach()
    r = step.problem.y[row] - operator.matrix @ prior(step.x, step.t).x0[row].detach().flatten()
    return -J.T @ operator.matrix.T @ r / torch.linalg.vector_norm(r)


def test_dps_moves_down_the_residual(mixture, dense):
    step = make_step(mixture, dense)
    before = proposal_of(step)
    after = DPS(0.7).guide_transition(step, before)
    for row in range(4):
        expected = -0.7 * dense_residual_gradient(step, mixture, dense, row)
        torch.testing.assert_close((after.mean - before.mean)[row].flatten(), expected)
    assert after.std is before.std
    assert after.noise is before.noise


@pytest.mark.parametrize("level", ["then", "now"])
def test_mcg_lands_on_the_noised_measurement(mixture, dense, level):
    step = make_step(mixture, dense)
    guidance = MCG(0.5, level=level)
    before = proposal_of(step)
    x = guidance.guide_sample(step, guidance.guide_transition(step, before).sample())
    noised = {"now": step.t, "then": step.s}[level]
    target = noised.alpha * step.problem.y + noised.sigma * dense(step.normal("mcg"))
    torch.testing.assert_close(dense(x), target, rtol=1e-6, atol=1e-6)
    # What A does not see is left as the gradient step made it.
    moved = x - DPS(0.5).guide_transition(step, before).sample()
    null = torch.linalg.svd(dense.matrix).Vh[3:]
    assert float((moved.flatten(1) @ null.T).abs().max()) < 1e-6


def assert_posterior_mean(x0, step, operator, prior_mean, variances, noise_variances):
    """E[x₀ | x_t, y] from the joint Gaussian of (x₀, x_t, y), with no reference to the code."""
    n, (alpha, sigma) = 6, step.t[:2]
    eye = torch.eye(n, dtype=torch.float64)
    H = torch.cat([alpha * eye, operator.matrix])
    R = torch.block_diag(sigma**2 * eye, torch.diag(noise_variances))
    C = torch.diag(variances)
    gain = C @ H.T @ torch.linalg.inv(H @ C @ H.T + R)
    mean = torch.full((n,), prior_mean, dtype=torch.float64)
    for row in range(4):
        seen = torch.cat([step.x[row].detach().flatten(), step.problem.y[row]])
        expected = mean + gain @ (seen - H @ mean)
        torch.testing.assert_close(x0[row].flatten(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variance", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("index", [20, 300, 900])
def test_pigdm_is_exact_on_an_isotropic_gaussian(dense, variance, index):
    prior = GaussianMixture(torch.full((1, *SHAPE), 0.3, dtype=torch.float64), variance)
    step = make_step(prior, dense, index)
    guidance = PiGDM(prior_variance=variance, weight="posterior")
    x0 = guidance.guide_denoised(step, step.x0.detach())
    every = torch.ones(6, dtype=torch.float64)
    assert_posterior_mean(x0, step, dense, 0.3, variance * every, 0.1**2 * every[:3])


@pytest.mark.parametrize("std", [0.1, torch.tensor([[0.05, 0.1, 0.4]], dtype=torch.float64)])
@pytest.mark.parametrize("index", [20, 300, 900])
def test_moment_matching_is_exact_on_any_gaussian(dense, index, std):
    variances = torch.linspace(0.2, 3.0, 6, dtype=torch.float64).reshape(1, *SHAPE)
    prior = GaussianMixture(torch.full((1, *SHAPE), 0.3, dtype=torch.float64), variances)
    step = make_step(prior, dense, index, sigma=std)
    x0 = MomentMatching(krylov=3).guide_denoised(step, step.x0.detach())
    noise = torch.as_tensor(std, dtype=torch.float64).expand(1, 3)[0] ** 2
    assert_posterior_mean(x0, step, dense, 0.3, variances.flatten(), noise)
    assert step.cost.vjps == 3
    assert float(step.log["moments/residual"].max()) < 1e-6


def test_moment_matching_uses_the_denoisers_covariance(mixture, dense):
    step = make_step(mixture, dense)
    x0 = MomentMatching(krylov=3, scale=0.5).guide_denoised(step, step.x0.detach())
    A = dense.matrix
    for row in range(4):
        P = step.covariance_factor * jacobian(step, mixture, row).detach()
        r = step.problem.y[row] - A @ step.x0[row].detach().flatten()
        S = A @ P @ A.T + 0.1**2 * torch.eye(3, dtype=A.dtype)
        expected = 0.5 * P @ A.T @ torch.linalg.solve(S, r)
        moved = (x0 - step.x0.detach())[row].flatten()
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "part", [CMI(), MomentMatching(), TMPD(), CADPS(), Discrepancy(DPS()), ReSample(), FPS()]
)
def test_noise_is_needed(mixture, dense, part):
    step = make_step(mixture, dense, sigma=0.0)
    solver, guidances = (part, []) if isinstance(part, Solver) else (DDPM(), [part])
    sampler = Sampler(mixture, solver, guidances, num_steps=3)
    with pytest.raises(InputError, match=f"{type(part).__name__} needs measurement noise"):
        sampler.run(step.problem, step.noise, step.x)


@pytest.mark.parametrize("weight", ["canonical", "paper"])
def test_pigdm_moves_the_sample(mixture, dense, weight):
    step = make_step(mixture, dense)
    before = proposal_of(step)
    after = PiGDM(weight=weight, scale=0.5).guide_transition(step, before)
    r2 = step.t.sigma**2  # 1 − ᾱ_t
    A = dense.matrix
    shifted = A @ A.T + 0.1**2 / r2 * torch.eye(3, dtype=A.dtype)
    w = step.t.alpha * (step.s.alpha if weight == "canonical" else 1)
    for row in range(4):
        r = step.problem.y[row] - A @ step.x0[row].detach().flatten()
        g = jacobian(step, mixture, row).detach().T @ A.T @ torch.linalg.solve(shifted, r)
        moved = (after.mean - before.mean)[row].flatten()
        torch.testing.assert_close(moved, 0.5 * w * g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dsg_turns_the_noise_on_its_sphere(mixture, dense, rate):
    step = make_step(mixture, dense)
    before = proposal_of(step)
    after = DSG(rate).guide_transition(step, before)
    radius = math.sqrt(6)
    torch.testing.assert_close(norm(after.noise), torch.full((4,), radius, dtype=torch.float64))
    for row in range(4):
        g = dense_residual_gradient(step, mixture, dense, row).reshape(1, *SHAPE)
        z = before.noise[row : row + 1]
        mixed = (1 - rate) * z - rate * radius * unit(g)
        torch.testing.assert_close(after.noise[row], radius * unit(mixed)[0])
    assert after.mean is before.mean


def test_dsg_rests_between_intervals_and_at_the_end(mixture, dense):
    for index, interval in ((299, 5), (0, 1)):
        step = make_step(mixture, dense, index)
        before = proposal_of(step)
        assert DSG(0.2, interval).guide_transition(step, before) is before


@pytest.mark.parametrize("solver", [DDIM(0.0), Heun()], ids=str)
def test_dsg_needs_noise(mixture, solver):
    with pytest.raises(InputError, match="DSG steers the solver's noise"):
        Sampler(mixture, solver, [DSG()])
    Sampler(mixture, DDIM(0.1), [DSG()])


def test_ddpm_variances(mixture, dense):
    step = make_step(mixture, dense)
    chain = reverse_coefficients(step.t, step.s)
    for kind, variance in (("small", chain.variance), ("large", chain.beta)):
        transition = DDPM(kind).transition(step, lambda s: s.x0.detach())
        assert transition.std**2 == pytest.approx(variance)
    with pytest.raises(InputError, match="learned variance"):
        Sampler(mixture, DDPM("learned"))


def test_learned_variance_interpolates_in_the_logarithm(dense):
    class Learned(GaussianMixture):
        learns_variance = True

        def forward(self, x, level):
            fraction = torch.linspace(0, 1, 6, dtype=x.dtype).reshape(1, *SHAPE).expand_as(x)
            return super().forward(x, level)._replace(variance_fraction=fraction)

    prior = Learned(torch.zeros(1, *SHAPE, dtype=torch.float64))
    step = make_step(prior, dense)
    std = DDPM("learned").transition(step, lambda s: s.x0.detach()).std
    chain = reverse_coefficients(step.t, step.s)
    variance = std[0].flatten() ** 2
    assert float(variance[0]) == pytest.approx(chain.variance)
    assert float(variance[-1]) == pytest.approx(chain.beta)
    ratios = variance[1:] / variance[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(5))


@pytest.mark.parametrize("solver", [DDPM(), DDIM(0.0), DDIM(0.5)], ids=str)
def test_unguided_solvers_reproduce_the_mixture(mixture, dense, solver):
    count = 1500
    noise, like = numbered(count, 2), torch.zeros(count, *SHAPE, dtype=torch.float64)
    problem = Problem(torch.zeros(count, 3, dtype=torch.float64), dense, 0.1)
    draws = Sampler(mixture, solver, num_steps=150).run(problem, noise, like).flatten(1)
    truth = mixture.sample(100_000, torch.Generator().manual_seed(9)).flatten(1)
    error = (draws.mean(0) - truth.mean(0)) / (truth.std(0) / math.sqrt(count))
    assert float(error.abs().max()) < 4.5
    torch.testing.assert_close(draws.T.cov(), truth.T.cov(), rtol=0.15, atol=0.04)
    # more than moments: one-dimensional Wasserstein distances along random directions
    directions = unit(torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).double())
    grid = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    a, b = ((s @ directions.T).quantile(grid, dim=0) for s in (draws, truth))
    assert float((a - b).abs().mean(0).max()) < 0.08
