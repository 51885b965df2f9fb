"""Photon noise: its law, its estimate from y, and the posterior that guidances make of it."""

import numpy as np
import pytest
import torch
from conftest import SHAPE, make_step
from scipy import stats

from cmi_lightning import GaussianNoise, InputError, PoissonGaussianNoise, PoissonNoise, Problem
from cmi_lightning.exact import GaussianPrior, exact_posterior
from cmi_lightning.guidance import CMI, DPS, MomentMatching, PiGDM, residual_gradient
from cmi_lightning.measurement_noise import poisson
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Dense, Identity, RandomMask
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Level
from cmi_lightning.solvers import DDPM

LONG = torch.float64


def test_counts_are_the_quantiles_of_poissons_law():
    z = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=LONG)
    rate = torch.cat([torch.linspace(0, 30, 200), torch.logspace(1.5, 5, 200)]).to(LONG)
    expected = stats.poisson.ppf(stats.norm.cdf(z.numpy()), rate.numpy())
    assert np.array_equal(poisson(rate, z).numpy(), expected)
    assert torch.equal(poisson(torch.tensor([-3.0, 0.0]), torch.tensor([2.0, 2.0])), torch.zeros(2))


@pytest.mark.parametrize("noise", [PoissonNoise(40.0), PoissonGaussianNoise(40.0, 0.1, "unit")])
def test_variance_is_that_of_the_draws(noise):
    x = torch.tensor([-0.8, 0.0, 0.7]).reshape(1, 1, 1, 3).expand(1, 1, 8000, 3)
    y = Problem.simulate(x, Identity(), noise, SampleNoise(0, ["a"])).y[0, 0]
    extra = 0.04 if isinstance(noise, PoissonGaussianNoise) else 0.0
    variance = 2 * (x[0, 0, 0] + 1) / 40 + extra  # 4 u/peak
    assert torch.allclose(y.var(0), variance, rtol=0.05)
    assert torch.allclose(y.mean(0), x[0, 0, 0], atol=0.01)
    assert torch.allclose((noise.std(y) ** 2).mean(0), variance, rtol=0.06)


def test_noise_belongs_to_the_sample_and_to_measured_entries():
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    both = Problem.simulate(x, RandomMask(0.5), PoissonNoise(20), SampleNoise(0, ["a", "b"]))
    alone = Problem.simulate(x[1:], RandomMask(0.5), PoissonNoise(20), SampleNoise(0, ["b"]))
    assert torch.equal(both.y[1:], alone.y)
    assert both.std.shape == both.y.shape
    gaussian = Problem.simulate(x, RandomMask(0.5), GaussianNoise(0.1), SampleNoise(0, ["a", "b"]))
    plain = Problem.simulate(x, RandomMask(0.5), 0.1, SampleNoise(0, ["a", "b"]))
    assert torch.equal(gaussian.y, plain.y)
    assert gaussian.noise_std == 0.1


@pytest.fixture
def photons(dense: Dense) -> tuple[GaussianPrior, Problem]:
    """A Gaussian prior, and counts: every measurement with a noise level of its own."""
    g = torch.Generator().manual_seed(1)
    prior = GaussianPrior(0.1 * torch.randn(SHAPE, generator=g, dtype=LONG))
    x = prior.mean()[None].expand(2, *SHAPE) + 0.3
    problem = Problem.simulate(x, dense, PoissonNoise(30.0), SampleNoise(0, ["a", "b"]))
    assert all(row.unique().numel() == 3 for row in problem.std)
    return prior, problem


def test_the_guided_mean_is_the_exact_posterior_mean(photons):
    """Where x_t holds nothing of x₀, E[x₀ | x_t, y] is E[x₀ | y] with the counts' std map."""
    prior, problem = photons
    step = make_step(prior, problem.operator, 999, 2)
    step.problem = problem
    step.t = Level(1e-6, 1.0, 999)
    for guidance in (MomentMatching(krylov=3), PiGDM(weight="posterior")):
        mean = guidance.guide_denoised(step, step.x0)
        for row in range(2):
            exact = exact_posterior(prior, problem, row)
            torch.testing.assert_close(mean[row].detach(), exact.mean(), rtol=1e-4, atol=1e-5)


def test_dps_weighs_residuals_by_their_noise(photons):
    prior, problem = photons
    step = make_step(prior, problem.operator, 300, 2)
    step.problem = problem
    sigma = problem.std
    mean = (sigma**2).mean(1, keepdim=True).sqrt()
    norms = torch.linalg.vector_norm((problem.y - problem.operator(step.x0)) * mean / sigma, dim=1)
    torch.testing.assert_close(residual_gradient(step), step.grad(norms))
    flat = Problem(problem.y, problem.operator, torch.full_like(problem.y, 0.2))
    same = make_step(prior, problem.operator, 300, 2)
    same.problem = flat
    plain = make_step(prior, problem.operator, 300, 2)
    plain.problem = Problem(problem.y, problem.operator, 0.2)
    torch.testing.assert_close(residual_gradient(same), residual_gradient(plain))


def test_cmi_runs_on_counts(photons):
    prior, problem = photons
    noise, like = SampleNoise(0, ["a", "b"]), torch.zeros(2, *SHAPE, dtype=LONG)
    assert bool(
        Sampler(prior, DDPM(), [CMI(), DPS()], 6).run(problem, noise, like).isfinite().all()
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PoissonNoise(0.0), "PoissonNoise.peak must be a number, above 0"),
        (lambda: PoissonGaussianNoise(10, -1.0), "sigma must be a number, at least 0"),
        (lambda: GaussianNoise(-0.1), "GaussianNoise.sigma must be a number, at least 0"),
        (lambda: GaussianNoise(float("nan")), "GaussianNoise.sigma must be a number, at least 0"),
    ],
)
def test_bad_noise(make, words):
    with pytest.raises(InputError, match=words):
        make()
