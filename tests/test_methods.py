"""Methods against closed forms: exact laws on Gaussian priors, and limits that must coincide.

Where a method is affine in its random numbers, its law is found exactly (``sampler_law``) and is
compared with a recursion of dense matrices that shares no code with it, or with the posterior.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from inspect import isabstract
from itertools import pairwise
from typing import get_args

import pytest
import torch
from conftest import make_step, randn
from lightning import LightningDataModule
from torch import Tensor

import cmi_lightning
from cmi_lightning import (
    PosteriorSampler,
    callbacks,
    data,
    denoisers,
    exact,
    guidance,
    information,
    operators,
    solvers,
)
from cmi_lightning.data import ImageFolderData, MeasurementFolderData, PhotoCropsData
from cmi_lightning.denoisers import AsRGB, EDMDenoiser, NetworkDenoiser, Tiled, shipped_prior
from cmi_lightning.errors import InputError
from cmi_lightning.exact import (
    DenseCovariance,
    GaussianMixture,
    GaussianPrior,
    StationaryCovariance,
    exact_posterior,
    power_law_prior,
    sampler_law,
    wasserstein,
)
from cmi_lightning.guidance import (
    CADPS,
    CDPS,
    CMI,
    DDNM,
    DMPS,
    DPS,
    DSG,
    LAMP,
    LLE,
    MCG,
    SITCOM,
    TMPD,
    AnnealedDPS,
    DiffPIR,
    Discrepancy,
    Guidance,
    LLETraining,
    MomentMatching,
    PiGDM,
)
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    BoxMask,
    Convolution,
    Dense,
    GivenKernel,
    PixelMask,
    Separable,
    VaryingBlur,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Level, Schedule, ScheduleName
from cmi_lightning.solvers import (
    DAPS,
    DDIM,
    DDPM,
    DDRM,
    FPS,
    DDNMPlus,
    DPMSolver,
    Euler,
    Heun,
    PnPDM,
    REDDiff,
    Renoise,
    Resampled,
    Solver,
)
from cmi_lightning.training import ScoreTraining

N, M, STD = 4, 2, 0.1
EYE = torch.eye(N, dtype=torch.float64)
CHAIN, STRAIGHT = (schedule.respace(60) for schedule in (Schedule.linear(), Schedule.rectified()))
LIKE = torch.zeros(1, N, dtype=torch.float64)


A = randn(M, N, seed=1) / 2
ROOT = randn(N, N, seed=2)
C = ROOT @ ROOT.mT / N / 2 + 0.05 * EYE
MU = 0.3 * randn(N, seed=3)
PRIOR = GaussianPrior(MU, DenseCovariance(C[None]), CHAIN)
Y = (PRIOR.sample(1, torch.Generator().manual_seed(4)) @ A.mT)[0] + STD * randn(M, seed=5)
PROBLEM = Problem(Y[None], Dense(A), STD)
POSTERIOR = exact_posterior(PRIOR, PROBLEM)
EXACT = (POSTERIOR.means[0], POSTERIOR.covariances.matrix()[0])
SD = float(EXACT[1].trace().sqrt())


def law(
    solver: Solver,
    guidances: list[Guidance],
    schedule: Schedule = CHAIN,
    problem: Problem = PROBLEM,
    prior: GaussianPrior | None = None,
    num_steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    prior = prior or GaussianPrior(MU, DenseCovariance(C[None]), schedule)
    return sampler_law(Sampler(prior, solver, guidances, num_steps, clamp=False), problem, LIKE)


def distance(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor] = EXACT) -> float:
    """W₂ in posterior standard deviations."""
    return wasserstein(found, truth) / SD


# Laws by dense recursions: x_s = F x_t + c + N(0, Q)

Affine = tuple[Tensor, Tensor, Tensor]


def recursion(step: Callable[[Level, Level], Affine], start: tuple[Tensor, Tensor] | None = None):
    top = CHAIN[len(CHAIN) - 1]
    mean, covariance = start or (0 * MU, (top.alpha**2 + top.sigma**2) * EYE)
    for _, t, s in CHAIN.pairs():
        F, c, Q = step(t, s)
        mean, covariance = F @ mean + c, F @ covariance @ F.mT + Q
    return mean, covariance


def denoised(t: Level) -> tuple[Tensor, Tensor]:
    """J and b of x̂₀ = J x_t + b."""
    J = t.alpha * C @ torch.linalg.inv(t.alpha**2 * C + t.sigma**2 * EYE)
    return J, MU - t.alpha * J @ MU


def ancestral(t: Level, s: Level) -> Affine:
    """DDPM's mean and variance by Bayes' rule."""
    ratio = t.alpha / s.alpha
    beta = t.sigma**2 - ratio**2 * s.sigma**2
    J, b = denoised(t)
    F = ratio * s.sigma**2 / t.sigma**2 * EYE + s.alpha * beta / t.sigma**2 * J
    return F, s.alpha * beta / t.sigma**2 * b, beta * s.sigma**2 / t.sigma**2 * EYE


U, SV, VH = torch.linalg.svd(A)
SV = torch.cat([SV, torch.zeros(N - M, dtype=SV.dtype)])


def ddnm_plus(eta: float) -> Callable[[Level, Level], Affine]:
    """DDNM+ in the SVD form of its paper, direction by direction."""

    def step(t: Level, s: Level) -> Affine:
        J, b = denoised(t)
        E, e = (EYE - t.alpha * J) / t.sigma, -t.alpha * b / t.sigma
        F, c, q = torch.zeros_like(EYE), torch.zeros_like(MU), torch.zeros_like(MU)
        for i in range(N):
            v, P = VH[i], torch.outer(VH[i], VH[i])
            if SV[i] == 0:
                kept = s.sigma * math.sqrt(1 - eta**2)
                F, c, q[i] = (
                    F + P @ (s.alpha * J + kept * E),
                    c + P @ (s.alpha * b + kept * e),
                    (eta * s.sigma) ** 2,
                )
                continue
            clear = s.sigma >= s.alpha * STD / SV[i]
            weight = 1 if clear else SV[i] * s.sigma * math.sqrt(1 - eta**2) / (s.alpha * STD)
            F = F + s.alpha * (1 - weight) * P @ J
            c = c + s.alpha * (1 - weight) * P @ b + s.alpha * weight * v * (U.mT @ Y)[i] / SV[i]
            used = (s.alpha * STD / SV[i]) ** 2
            q[i] = s.sigma**2 - used if clear else (eta * s.sigma) ** 2
        return F, c, VH.mT * q @ VH

    return step


def test_ddrm_with_eta_b_1_is_ddnm_plus():
    top = CHAIN[len(CHAIN) - 1]
    ratio = top.sigma / top.alpha
    seen = SV * ratio > STD
    inverse = torch.where(seen, 1 / SV.clamp_min(1e-9), 0)
    centre = top.alpha * (VH.mT[:, :M] @ (inverse[:M] * (U.mT @ Y)))
    spread = top.alpha**2 * (ratio**2 - (STD * inverse) ** 2)
    expected = recursion(ddnm_plus(0.85), (centre, VH.mT * spread @ VH))
    for found, wanted in zip(law(DDRM(), []), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_ddrm_without_noise_keeps_what_is_known():
    x = randn(1, 1, 2, 2, seed=7)
    operator = PixelMask.from_mask(torch.tensor([[[1, 0], [1, 1]]]), x)
    prior = GaussianPrior(torch.zeros(1, 2, 2, dtype=torch.float64), 1.0, CHAIN)
    sampler = Sampler(prior, DDRM(), clamp=False)
    noise = SampleNoise(0, ["a"])
    for record in sampler.iterate(Problem(operator(x), operator, 0.0), noise, x):
        z = noise.normal("solver", record.index, x)
        noised = record.s.alpha * x + record.s.sigma * z
        torch.testing.assert_close(operator(record.x), operator(noised))


def test_ddrm_wants_one_noise_level_and_singular_values():
    uneven = replace(PROBLEM, noise_std=torch.tensor([[0.1, 0.2]], dtype=torch.float64))
    with pytest.raises(InputError, match="DDRM needs one noise level for each image"):
        Sampler(PRIOR, DDRM()).run(uneven, SampleNoise(0, ["a"]), LIKE)


@pytest.mark.parametrize("std", [0.1, torch.tensor([[0.05, 0.3]], dtype=torch.float64)])
def test_ddnm_plus_by_one_solve(std):
    noise = torch.as_tensor(std, dtype=torch.float64).expand(1, M)[0]

    def step(t: Level, s: Level) -> Affine:
        J, b = denoised(t)
        if s.sigma == 0:
            return J, b, 0 * EYE
        kappa = torch.diag((s.alpha * noise / s.sigma) ** 2)
        K = A.mT @ torch.linalg.inv(A @ A.mT + kappa)
        Q = s.sigma**2 * (EYE - K @ kappa @ K.mT)  # with that of y, σ_s² in every direction
        return s.alpha * (EYE - K @ A) @ J, s.alpha * ((EYE - K @ A) @ b + K @ Y), Q

    found = law(DDNMPlus(), [], problem=replace(PROBLEM, noise_std=std))
    for part, wanted in zip(found, recursion(step), strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-7, atol=1e-7)


def test_ddnm_plus_without_noise_is_ddnm():
    quiet = replace(PROBLEM, noise_std=0.0)
    one, two = law(DDNMPlus(), [], problem=quiet), law(Renoise(1.0), [DDNM()], problem=quiet)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(A @ one[0], Y)


def test_cdps_by_dense_matrices():
    def step(t: Level, s: Level) -> Affine:
        F, c, Q = ancestral(t, s)
        if s.sigma == 0:
            return F, c, Q
        beta, R = Q[0, 0], (s.alpha * STD) ** 2
        W = beta * A.mT @ torch.linalg.inv(beta * A @ A.mT + R * torch.eye(M))
        left = torch.linalg.inv(EYE / beta + A.mT @ A / R)
        return (
            (EYE - W @ A) @ F,
            (EYE - W @ A) @ c + s.alpha * W @ Y,
            left + (s.sigma**2 * W @ A @ A.mT @ W.mT),
        )

    expected = recursion(step)
    for solver, guidances in ((DDPM(), [CDPS()]), (FPS(1, 1.0), [])):
        for found, wanted in zip(law(solver, guidances), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_renoised_proximal_steps_by_dense_matrices():
    def step(t: Level, s: Level) -> Affine:
        J, b = denoised(t)
        r2 = 0.7 * t.sigma**2 / (2.0 * 0.7 * t.alpha**2 + t.sigma**2)
        W = r2 * A.mT @ torch.linalg.inv(r2 * A @ A.mT + STD**2 * torch.eye(M))
        L, c = (EYE - W @ A) @ J, (EYE - W @ A) @ b + W @ Y
        kept = math.sqrt(0.7) * s.sigma / t.sigma
        return (
            s.alpha * L + kept * (EYE - t.alpha * L),
            (s.alpha - kept * t.alpha) * c,
            0.3 * s.sigma**2 * EYE,
        )

    found = law(Renoise(0.3), [DiffPIR(weight=2.0, prior_variance=0.7)])
    for part, wanted in zip(found, recursion(step), strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-7, atol=1e-7)


# Distances to the posterior


# W₂ in posterior standard deviations at 60 levels: the bound is what was found, and 10 % more.
FAR = {
    "MomentMatching": (DDPM(), [MomentMatching(M)], 0.13),
    "MomentMatching, DDIM": (DDIM(), [MomentMatching(M)], 0.068),
    "MomentMatching, straight": (DDPM(), [MomentMatching(M)], 0.0675, STRAIGHT),
    "MomentMatching, DDIM, straight": (DDIM(), [MomentMatching(M)], 0.032, STRAIGHT),
    "MomentMatching, 2M": (DPMSolver(), [MomentMatching(M)], 0.066),
    "line search": (DDPM(), [MomentMatching(1)], 0.42),
    "PiGDM": (DDPM(), [PiGDM(float(C.trace()) / N, "posterior")], 0.353),
    "TMPD": (DDPM(), [TMPD()], 0.193),
    "CADPS": (DDPM(), [CADPS(shrink=0.0)], 0.44),
    "AnnealedDPS": (DDPM(), [AnnealedDPS()], 1.03),
    "DMPS": (DDPM(), [DMPS()], 0.646),
    "DiffPIR": (Renoise(0.3), [DiffPIR()], 0.408),
    "CDPS": (DDPM(), [CDPS()], 0.463),
    "DDRM": (DDRM(), [], 0.333),
    "DDNM+": (DDNMPlus(), [], 0.451),
    "DAPS, x̂₀": (DAPS(0, spread=1.0), [], 0.097),
    "DAPS, flow": (DAPS(3, spread=1.0), [], 0.282),
}


@pytest.mark.parametrize("name", FAR)
def test_distance_to_the_posterior(name):
    solver, guidances, bound, *schedule = FAR[name]
    assert distance(law(solver, guidances, *schedule)) < bound


def test_distance_to_the_posterior_of_uneven_noise():
    uneven = replace(PROBLEM, noise_std=torch.tensor([[0.05, 0.3]], dtype=torch.float64))
    posterior = exact_posterior(PRIOR, uneven)
    truth = posterior.means[0], posterior.covariances.matrix()[0]
    assert distance(law(DDPM(), [MomentMatching(M)], problem=uneven), truth) < 0.13


@pytest.mark.parametrize(
    ("solver", "guidances"),
    [(DDPM(), [DiffPIR(prior_variance=0.4)]), (DAPS(0, low=0.011, spread=1.0), [])],
    ids=["exact mean", "DAPS, x̂₀"],
)
def test_the_posterior_in_a_thousand_levels(solver, guidances):
    """Methods that are exact on Gaussian priors come near in proportion to the number of levels."""
    one = torch.ones(1, 1, dtype=torch.float64)
    prior = GaussianPrior(0.3 * one[0], 0.4)
    problem = Problem(0.9 * one, Dense(one), 0.3)
    posterior = exact_posterior(prior, problem)
    truth = posterior.means[0], posterior.covariances.matrix()[0]
    far = []
    for steps in (100, 1000):
        sampler = Sampler(prior, solver, guidances, steps, clamp=False)
        far.append(wasserstein(sampler_law(sampler, problem, one), truth) / float(truth[1].sqrt()))
    assert far[1] < 0.02
    assert far[1] < far[0] / 4


def test_renoising_afresh_narrows_what_is_unseen():
    """Variance → (1 + √(1 − ζ))/2 of the prior's, where y tells nothing."""
    prior = GaussianPrior(torch.zeros(1, dtype=torch.float64), 0.7)
    blind = Problem(torch.zeros(1, 1).double(), Dense(torch.zeros(1, 1).double()), 0.1)
    for zeta in (0.3, 1.0):
        # long tails on both sides, and many levels
        prior.schedule = Schedule.edm(300, 1e-3, 80.0)
        sampler = Sampler(prior, Renoise(zeta), clamp=False)
        _, covariance = sampler_law(sampler, blind, LIKE[:, :1])
        assert float(covariance) / 0.7 == pytest.approx((1 + math.sqrt(1 - zeta)) / 2, abs=0.02)


def test_daps_widens_by_its_flow():
    """Variance of what y does not see: right with x̂₀, towards twice with the flow's end."""
    prior = GaussianPrior(torch.zeros(1, dtype=torch.float64), 0.7, Schedule.edm(200, 1e-3, 100.0))
    blind = Problem(torch.zeros(1, 1).double(), Dense(torch.zeros(1, 1).double()), 0.1)
    found = []
    for ode_steps, spread in ((0, 1.0), (1, 1.0), (4, 1.0), (4, 0.3)):
        solver = DAPS(ode_steps, ode_end=1e-3, low=0.01, spread=spread)
        sampler = Sampler(prior, solver, clamp=False, num_steps=100)
        _, covariance = sampler_law(sampler, blind, LIKE[:, :1])
        found.append(float(covariance) / 0.7)
        # the same by hand: x̄ ← x̂ + ϱ z, then + ϱ_s z'
        chain = [level.sigma for _, level, _ in sampler.schedule.pairs()]
        variance = chain[0] ** 2 + 1
        for rho, below in zip(chain, [*chain[1:], 0.0], strict=True):
            factor = 0.7 / (0.7 + rho**2) if ode_steps == 0 else 1.0
            ramp = [
                (rho ** (1 / 7) + k / max(ode_steps, 1) * (1e-3 ** (1 / 7) - rho ** (1 / 7))) ** 7
                for k in range(ode_steps + 1)
            ]
            for u, w in pairwise(ramp):
                factor *= 1 + (w - u) / u * (1 - 0.7 / (0.7 + u**2))
            variance = factor**2 * variance + (spread * rho) ** 2 + below**2
        assert float(covariance) == pytest.approx(variance, rel=1e-6)
    assert found[0] == pytest.approx(1, abs=0.1)
    assert found[0] < found[1] < found[2]
    assert found[2] > 1.3
    assert found[3] < found[2]


def test_pnpdm_ends_in_the_law_of_its_last_level():
    """The posterior with Σ_n + ρ² A Aᵀ for Σ_n; but for the deficit of the inner chain's spread."""
    sampler = Sampler(PRIOR, PnPDM(3.0, 0.4, 0.7, inner=25), num_steps=30, clamp=False)
    mean, covariance = sampler_law(sampler, PROBLEM, LIKE)
    S = A @ C @ A.mT + STD**2 * torch.eye(M) + 0.4**2 * A @ A.mT
    K = C @ A.mT @ torch.linalg.inv(S)
    exact = C - K @ A @ C
    assert float((mean - MU - K @ (Y - A @ MU)).norm()) < 0.02 * SD
    assert 0.75 < float((covariance.trace() / exact.trace()).sqrt()) < 1.02
    assert len({level.sigma / level.alpha for _, level, _ in sampler.schedule.pairs()}) < 10


def test_walks_of_repaint_come_nearer():
    once, often = (distance(law(Resampled(DDPM(), 5, k), [MCG(0.0)])) for k in (1, 3))
    assert often < once


# Methods that must coincide


def runs(prior: GaussianMixture, problem: Problem, *methods: tuple[Solver, list[Guidance]]):
    noise = SampleNoise(0, [str(i) for i in range(len(problem.y))])
    like = LIKE.expand(len(problem.y), -1)
    return [Sampler(prior, s, g, clamp=False).run(problem, noise, like) for s, g in methods]


BATCH = replace(PROBLEM, y=Y + 0.5 * randn(3, M, seed=9))


def test_on_an_isotropic_prior_all_solves_agree():
    prior = GaussianPrior(MU, 0.7, CHAIN)
    guidances = [DiffPIR(prior_variance=0.7), PiGDM(0.7, "posterior"), MomentMatching(M)]
    first, *others = runs(prior, BATCH, *((DDPM(), [g]) for g in guidances))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-7)


def test_cdps_without_noise_is_mcg_but_for_the_last_step():
    quiet = replace(BATCH, noise_std=0.0)
    noise, like = SampleNoise(0, ["a", "b", "c"]), LIKE.expand(3, -1)
    one = list(Sampler(PRIOR, DDPM(), [CDPS()], clamp=False).iterate(quiet, noise, like))

    class Likewise(MCG):
        """MCG with C-DPS's random numbers."""

        def guide_sample(self, step, x):
            noised = step.s.alpha * step.problem.y + step.s.sigma * step.problem.operator(
                step.normal("cdps/noise")
            )
            return x - step.problem.operator.pinv(step.problem.operator(x) - noised)

    two = list(Sampler(PRIOR, DDPM(), [Likewise(0.0)], clamp=False).iterate(quiet, noise, like))
    for a, b in zip(one[:-1], two[:-1], strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(one[-1].x, two[-1].x)


def test_diagonal_methods_are_exact_where_all_is_diagonal():
    variances = torch.tensor([0.2, 1.0, 0.5, 2.0], dtype=torch.float64)
    prior = GaussianPrior(MU, variances, CHAIN)
    mask = Dense(EYE[[0, 2]])
    problem = Problem(BATCH.y, mask, STD)
    exact, *others = runs(
        prior,
        problem,
        *(
            (DDPM(), [g])
            for g in (MomentMatching(M), TMPD(), CADPS(shrink=0.0), CADPS(probes=3, shrink=0.0))
        ),
    )
    for other in others:
        torch.testing.assert_close(other, exact, rtol=1e-5, atol=1e-6)


def test_annealed_dps_is_pigdm_with_a_flat_prior_on_rows_of_length_one():
    rows = torch.linalg.svd(A).Vh[:M]
    problem = replace(BATCH, operator=Dense(rows))
    one, two = runs(
        PRIOR,
        problem,
        (DDIM(), [AnnealedDPS()]),
        (DDIM(), [PiGDM(math.inf, "posterior")]),
    )
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_annealed_dps_knows_how_strong_the_operator_is():
    """The unit of y changes nothing."""
    rows = torch.linalg.svd(A).Vh[:M]
    strong = replace(BATCH, operator=Dense(rows))
    weak = Problem(strong.y / 8, Dense(rows / 8), STD / 8)
    one, two = (runs(PRIOR, p, (DDIM(), [AnnealedDPS()]))[0] for p in (strong, weak))
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_dmps_is_the_score_for_a_flat_prior(mixture, dense):
    step = make_step(mixture, dense)
    rho2 = (step.t.sigma / step.t.alpha) ** 2
    before = DDPM().transition(step, lambda s: s.x0.detach())
    moved = DMPS().guide_transition(step, before).mean - before.mean
    B = dense.matrix
    S = rho2 * B @ B.mT + 0.1**2 * torch.eye(3, dtype=B.dtype)
    r = step.problem.y - step.x.detach().flatten(1) @ B.mT / step.t.alpha
    expected = step.coefficients.from_x0 * rho2 * torch.linalg.solve(S, r.mT).mT @ B
    torch.testing.assert_close(moved.flatten(1), expected)


def test_one_krylov_dimension_is_dps_with_the_exact_line_search(mixture, dense):
    step = make_step(mixture, dense)
    x0 = MomentMatching(krylov=1).guide_denoised(step, step.x0.detach())
    r = step.residual.detach()
    direction = step.covariance_factor * step.vjp(dense.adjoint(r))
    r_S_r = (r * dense(direction)).sum(1) + 0.1**2 * (r * r).sum(1)
    size = (r * r).sum(1) / r_S_r
    torch.testing.assert_close(x0 - step.x0.detach(), size[:, None, None, None] * direction)


def test_the_code_of_cadps_is_dps_nearly(mixture, dense):
    step = make_step(mixture, dense)
    before = DDPM().transition(step, lambda s: s.x0.detach())
    moved = CADPS("code", scale=1.0).guide_transition(step, before)
    plain = DPS(1.0).guide_transition(step, before)
    t, u = step.t, mixture.schedule[299]

    def epsilon(level: Level) -> Tensor:
        return (step.x.detach() - level.alpha * mixture(step.x, level).x0.detach()) / level.sigma

    factor = 1 + epsilon(t) - epsilon(u)
    torch.testing.assert_close(moved.mean - before.mean, factor * (plain.mean - before.mean))
    assert float((factor - 1).abs().max()) < 0.05
    assert float((factor - 1).abs().max()) > 0


def test_sitcom_in_the_limit():
    """K → ∞: x̂₀ + J Jᵀ Aᵀ(A J Jᵀ Aᵀ + λ)⁺ r, which is DDNM for an isotropic prior and λ = 0."""
    quiet = replace(BATCH, noise_std=0.0)
    for prior, closeness in ((PRIOR, 0.05), (GaussianPrior(MU, 0.7, CHAIN), 0.0)):
        x = prior.sample(3, torch.Generator().manual_seed(0))
        from cmi_lightning.step import Step

        step = Step(9, x, CHAIN[9], CHAIN[8], quiet, prior, SampleNoise(0, ["a", "b", "c"]))
        J = prior.jacobian(x[:1], step.t)[0]
        rate = 0.4 / float(torch.linalg.matrix_norm(A @ J, 2)) ** 2
        sitcom = SITCOM(600, rate, closeness, "descent")
        found = sitcom.guide_denoised(step, step.x0)
        G = A @ J @ J.mT @ A.mT + closeness * torch.eye(M)
        r = quiet.y - step.x0.detach() @ A.mT
        expected = step.x0.detach() + torch.linalg.solve(G, r.mT).mT @ A @ J @ J.mT
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if closeness == 0:
            ddnm = DDNM().guide_denoised(step, step.x0.detach())
            torch.testing.assert_close(found, ddnm, rtol=1e-5, atol=1e-5)


def test_sitcoms_adam_is_torchs(mixture, dense):
    step = make_step(mixture, dense, sigma=0.0)
    found = SITCOM(4, 0.05, closeness=0.3).guide_denoised(step, step.x0)
    v = step.x.detach().clone().requires_grad_()
    adam = torch.optim.Adam([v], lr=0.05)
    for _ in range(4):
        adam.zero_grad()
        r = step.problem.y - dense(mixture(v, step.t).x0)
        (r.square().sum() + 0.3 * (v - step.x.detach()).square().sum()).backward()
        adam.step()
    torch.testing.assert_close(found, mixture(v, step.t).x0.detach())
    assert step.cost.forwards == 5
    assert step.cost.vjps == 4


def test_sitcom_rests_where_the_noise_is_met(mixture, dense):
    step = make_step(mixture, dense)
    y = step.problem.y.clone()
    y[0] = dense(step.x0.detach())[0]
    step.problem = replace(step.problem, y=y)
    step = step.at(step.x, step.t)  # as if nothing were known of it yet
    found = SITCOM(3).guide_denoised(step, step.x0)
    assert torch.equal(found[0], step.x0[0].detach())
    assert not torch.equal(found[1], step.x0[1].detach())


def test_reddiffs_adam_is_torchs():
    noise, like = SampleNoise(0, ["a", "b", "c"]), LIKE.expand(3, -1)
    records = list(Sampler(PRIOR, REDDiff(), num_steps=3).iterate(BATCH, noise, like))
    mean = BATCH.operator.pinv(BATCH.y).requires_grad_()
    adam = torch.optim.Adam([mean], lr=0.1, betas=(0.9, 0.99))
    z = noise.normal("start", 0, like)
    for index, t, s in CHAIN.respace(3).pairs():
        x = t.alpha * mean.detach() + t.sigma * z
        epsilon = (x - t.alpha * PRIOR(x, t).x0) / t.sigma
        adam.zero_grad()
        fit = 0.5 * (BATCH.y - mean @ A.mT).square().mean(1)
        (fit + 0.25 * t.sigma / t.alpha * ((epsilon - z) * mean).mean(1)).sum().backward()
        adam.step()
        z = noise.normal("solver", index, like)
        expected = s.alpha * mean.detach() + s.sigma * z
        torch.testing.assert_close(records[2 - index].x, expected, rtol=1e-6, atol=1e-6)


def test_langevin_without_noise_descends_to_the_proximal_point(mixture, dense):
    class Silent(SampleNoise):
        def normal(self, stream, step, like):
            return torch.zeros_like(like)

    step = make_step(mixture, dense)
    step.noise = Silent(0, list("abcd"))
    spread = step.t.sigma / step.t.alpha
    solver = DAPS(langevin_steps=3000, langevin_size=1e-3)
    found = solver._langevin(step, step.x0.detach(), spread)
    torch.testing.assert_close(
        found, step.problem.prox(step.x0.detach(), spread**2), rtol=0, atol=1e-4
    )


# Solvers


@pytest.mark.parametrize(
    ("one", "two"),
    [(DPMSolver(order=1), DDIM()), (DPMSolver("sde", order=1), DDPM()), (DDIM(1.0), DDPM())],
)
def test_solvers_that_are_the_same_step(mixture, dense, one, two):
    step = make_step(mixture, dense)
    a, b = (solver.transition(step, lambda s: s.x0.detach()) for solver in (one, two))
    torch.testing.assert_close(a.mean, b.mean)
    assert a.std == pytest.approx(b.std)
    assert b.std == 0 or torch.equal(a.noise, b.noise)


@pytest.mark.parametrize(
    ("solver", "better"), [(DPMSolver("midpoint"), 3), (DPMSolver("heun"), 3), (Heun(), 3.2)]
)
def test_solvers_of_second_order(solver, better):
    """The probability flow of N(0, v) is known: x̄ ∝ √(v + σ̄²)."""
    v, errors = 0.5, []
    for steps in (10, 20, 40):
        schedule = Schedule.edm(steps, 0.01, 10.0)
        prior = GaussianPrior(torch.zeros(1, dtype=torch.float64), v, schedule)
        noise, like = SampleNoise(0, ["a"]), torch.zeros(1, 1, dtype=torch.float64)
        problem = Problem(like, Dense(torch.eye(1).double()), 1.0)
        *_, before, _ = Sampler(prior, solver).iterate(problem, noise, like)  # down to σ_min
        start = math.sqrt(101) * float(noise.normal("start", 0, like))
        errors.append(abs(float(before.x) - start * math.sqrt((v + 1e-4) / (v + 100))))
    assert isinstance(solver, DPMSolver) or errors[0] / errors[1] > better
    assert errors[1] / errors[2] > better


def test_euler_follows_the_velocity():
    levels = torch.linspace(0.02, 0.98, 12).tolist()
    schedule = Schedule([1 - s for s in levels], levels, levels)
    prior = GaussianPrior(MU, DenseCovariance(C[None]), schedule)
    x, guidance = None, PiGDM(1.0, "posterior")
    noise, like = SampleNoise(0, ["a", "b", "c"]), LIKE.expand(3, -1)
    flow = Sampler(prior, Euler(start_signal=0.3), [guidance], clamp=False)
    assert flow.schedule[len(flow.schedule) - 1].alpha == pytest.approx(0.3)
    records = list(flow.iterate(BATCH, noise, like))
    # OT-ODE: v' = v + (σ/α) g with g = Jᵥ-corrected (r² A Aᵀ + Σ_n)⁻¹ r and r² = σ²/(σ² + α²)
    x = 0.3 * BATCH.operator.pinv(BATCH.y) + 0.7 * noise.normal("start", 0, like)
    for (_, t, s), record in zip(flow.schedule.pairs(), records, strict=True):
        x = x.detach().requires_grad_()
        x0 = prior(x, t).x0
        v = (x - x0) / t.sigma  # ε − x₀
        r2 = t.sigma**2 / (t.sigma**2 + t.alpha**2)
        S = r2 * A @ A.mT + STD**2 * torch.eye(M)
        u = torch.linalg.solve(S, (BATCH.y - x0.detach() @ A.mT).mT).mT @ A
        (g,) = torch.autograd.grad(x0, x, u)
        x = x.detach() + (s.sigma - t.sigma) * (v.detach() - t.sigma / t.alpha * g)
        torch.testing.assert_close(record.x, x, rtol=1e-7, atol=1e-7)


def test_particles_are_weighed_by_the_noised_measurement():
    from cmi_lightning.solvers.fps import _log_weight, _systematic

    means = [randn(3, N, seed=k) for k in range(4)]
    for variance in (0.3, 0.0):
        S = variance * A @ A.mT + STD**2 * torch.eye(M)
        law = torch.distributions.MultivariateNormal(torch.zeros(M).double(), S)
        found = torch.stack([_log_weight(BATCH, m, variance) for m in means], 1)
        wanted = torch.stack([law.log_prob(BATCH.y - m @ A.mT) for m in means], 1)
        torch.testing.assert_close(torch.log_softmax(found, 1), torch.log_softmax(wanted, 1))
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    assert _systematic(weights, torch.tensor([0.5]), 4).tolist() == [[0, 0, 1, 2]]
    u = torch.linspace(0.0005, 0.9995, 1000)
    one = _systematic(weights.expand(1000, -1), u, 1)[:, 0]
    assert torch.bincount(one, minlength=4).tolist() == [500, 250, 250, 0]


def test_particles_choose_between_modes():
    """One particle draws modes as the prior weighs them, more of them as y does (and further).

    Every y_s counts as a measurement of its own, so that particles are surer than y is.
    """
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]).double(), 0.05, schedule=CHAIN)
    count = 200
    problem = Problem(torch.full((count, 1), 0.2).double(), Dense(torch.eye(1).double()), 1.0)
    posterior = exact_posterior(prior, replace(problem, y=problem.y[:1]))
    share = float(posterior.log_weights.exp()[1])
    noise = SampleNoise(0, [str(i) for i in range(count)])
    like = torch.zeros(count, 1, dtype=torch.float64)
    right = [
        float((sampler.run(problem, noise, like) > 0).double().mean())
        for sampler in (Sampler(prior, FPS(k), clamp=False, num_steps=10) for k in (1, 6))
    ]
    assert right[0] < share < right[1]


# Plug-ins and wrappers


def test_discrepancy_lets_single_samples_rest(mixture, dense):
    step = make_step(mixture, dense)
    limit = float(norm(step.residual.detach()).median())
    factor = limit / float(step.problem.noise_norm[0])
    near = norm(step.residual.detach()) <= limit
    before = DDPM().transition(step, lambda s: s.x0.detach())
    after = Discrepancy(DPS(), factor).guide_transition(step, before)
    plain = DPS().guide_transition(step, before)
    assert torch.equal(after.mean[near], before.mean[near])
    assert torch.equal(after.mean[~near], plain.mean[~near])
    x0 = step.x0.detach()
    moved = Discrepancy(DDNM(), factor).guide_denoised(step, x0)
    assert torch.equal(moved[near], x0[near])
    assert not torch.equal(moved[~near], x0[~near])
    assert Discrepancy(DDNM()).differentiable is False
    assert Discrepancy(DDNM()).hooks == {"guide_denoised"}


def test_lamp_averages_with_the_step_before():
    x0 = [randn(3, N, seed=k) for k in range(3)]
    seen = []

    class Given(Guidance):
        differentiable = False

        def guide_denoised(self, step, x):
            return x0[2 - step.index]

    class Spy(Guidance):
        differentiable = False

        def guide_denoised(self, step, x):
            seen.append((step, x))
            return x

    sampler = Sampler(PRIOR, DDIM(), [Given(), LAMP(-0.5, warmup=1), Spy()], 3, clamp=False)
    sampler.run(BATCH, SampleNoise(0, list("abc")), LIKE.expand(3, -1))
    assert torch.equal(seen[0][1], x0[0])  # warm-up
    assert torch.equal(seen[2][1], x0[2])  # the last step
    past, here, there = (
        math.log(v.alpha / v.sigma) for v in (seen[1][0].previous, seen[1][0].t, seen[1][0].s)
    )
    h = there - here
    b = 0.5 * (1 - (1 + h) * math.exp(-h)) / (here - past)
    torch.testing.assert_close(seen[1][1], (1 - b) * x0[1] + b * x0[0])


def lle_run(guidances: list[Guidance]) -> Tensor:
    sampler = Sampler(PRIOR, DDIM(), guidances, 4, clamp=False)
    return sampler.run(BATCH, SampleNoise(0, list("abc")), LIKE.expand(3, -1))


def test_lle_of_the_identity_is_the_method():
    identity = [[0.0] * k + [1.0] for k in range(4)]
    assert torch.equal(lle_run([DDNM(), LLE(identity, identity)]), lle_run([DDNM()]))


def test_lle_wants_its_number_of_steps():
    with pytest.raises(InputError, match="for 2 steps and the chain has 4"):
        lle_run([LLE([[1.0], [0.5, 0.5]], [[1.0], [0.5, 0.5]])])
    with pytest.raises(InputError, match="must hold 1, 2, 3"):
        LLE([[1.0, 2.0]], [[1.0]])


def test_lle_is_trained_by_least_squares():
    truth = PRIOR.sample(40, torch.Generator().manual_seed(1))
    noise = SampleNoise(0, [str(i) for i in range(40)])
    problem = Problem.simulate(truth, Dense(A), STD, noise)
    training = LLETraining(truth)
    past: list[Tensor] = []

    class Spy(Guidance):
        differentiable = False

        def guide_denoised(self, step, x0):
            past.append(x0)
            return x0

    sampler = Sampler(PRIOR, DDIM(), [DDNM(), Spy(), training, Spy()], 3, clamp=False)
    trained = sampler.run(problem, noise, truth)
    lle = training.coefficients()
    P = torch.linalg.pinv(A) @ A
    for k in range(3):
        inputs = [past[2 * j + 1] for j in range(k)] + [past[2 * k]]
        for projector, found in ((P, lle.seen[k]), (EYE - P, lle.unseen[k])):
            X = torch.stack([(x @ projector).flatten() for x in inputs], 1)
            wanted = torch.linalg.lstsq(X, (truth @ projector).flatten()).solution

            def loss(w: Tensor) -> float:
                return float((X @ w - (truth @ projector).flatten()).square().mean())  # noqa: B023

            own = torch.tensor([0.0] * k + [1.0]).double()
            assert loss(torch.tensor(found).double()) <= loss(wanted) + 1e-3 * (
                loss(own) - loss(wanted) + 1e-6
            )
    base = Sampler(PRIOR, DDIM(), [DDNM()], 3, clamp=False).run(problem, noise, truth)
    again = Sampler(PRIOR, DDIM(), [DDNM(), lle], 3, clamp=False).run(problem, noise, truth)
    torch.testing.assert_close(again, trained)
    assert float((trained - truth).square().mean()) < float((base - truth).square().mean())


# CMI with each


@pytest.mark.parametrize(
    "solver",
    [Renoise(), DDRM(), DDNMPlus(), DAPS(0), DPMSolver(), Euler(), Resampled(DDPM(), 2, 2)],
    ids=lambda s: type(s).__name__,
)
def test_cmi_moves_every_solver_that_has_a_transition(mixture, dense, solver):
    noise, like = SampleNoise(0, ["a"]), torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    problem = Problem(torch.ones(1, 3, dtype=torch.float64), dense, 0.1)
    cmi = CMI(
        scale=0.3, step_size="noise", max_step=1.0, interval=1, min_signal=0.0, max_signal=1.0
    )
    x = [
        Sampler(mixture, solver, guidances, 4, clamp=False).run(problem, noise, like)
        for guidances in ([], [cmi])
    ]
    assert bool(torch.isfinite(x[1]).all())
    assert not torch.equal(*x)


@pytest.mark.parametrize("solver", [PnPDM(), REDDiff(), FPS()], ids=lambda s: type(s).__name__)
def test_cmi_is_refused_where_there_is_nothing_to_move(mixture, solver):
    name = type(solver).__name__
    with pytest.raises(InputError, match=rf"CMI moves the mean of a step, and {name} takes no"):
        Sampler(mixture, solver, [CMI()])


# Options and cost

NEEDED = {
    Discrepancy: {"guidance": DPS()},
    Resampled: {"solver": DDPM()},
    LLE: {"seen": [[1.0]], "unseen": [[1.0]]},
    Convolution: {"kernels": torch.ones(1, 3, 3) / 9},
    GivenKernel: {"kernels": torch.ones(3, 3) / 9},
    Dense: {"matrix": torch.eye(2)},
    DenseCovariance: {"matrix": torch.eye(2)},
    StationaryCovariance: {"spectrum": torch.ones(1, 4, 4)},
    GaussianMixture: {"means": LIKE},
    GaussianPrior: {"mean": LIKE},
    power_law_prior: {"image_shape": [1, 4, 4]},
    AsRGB: {"denoiser": shipped_prior("fashion-mnist")},
    Tiled: {"denoiser": shipped_prior("fashion-mnist")},
    NetworkDenoiser: {"network": lambda x, t: x, "weights": None},
    EDMDenoiser: {"network": lambda x, t: x, "weights": None},
    LLETraining: {"truth": torch.zeros(1, 1), "seen": [[1.0]], "unseen": [[1.0]]},
    PosteriorSampler: {"denoiser": shipped_prior("fashion-mnist")},
    Sampler: {"denoiser": GaussianPrior(LIKE[0]), "solver": DDPM()},
    Problem: {"y": LIKE, "operator": Dense(EYE)},
    Problem.simulate: {"x": LIKE, "operator": Dense(EYE), "noise": SampleNoise(0, ["a"])},
    SampleNoise: {"ids": ["a"]},
    ScoreTraining: {"network": torch.nn.Identity()},
    ImageFolderData: {"folder": "fashion-mnist-test"},
    MeasurementFolderData: {"measurements": "fashion-mnist-test"},
    PhotoCropsData: {"folder": "."},
}
PACKAGES = (cmi_lightning, callbacks, data, denoisers, exact, guidance, information, operators)
# They have an own sentence, take tensors that belong together, or need another package.
OTHERS = {BoxMask, PixelMask, Schedule, Separable, VaryingBlur, denoisers.DiffusersDenoiser}


def numbers() -> list[tuple[Callable, str, bool]]:
    """Every number, or row of numbers, that a public class takes, and whether it is whole."""
    makers = [
        vars(home).get(name) or getattr(home, name)
        for home in (*PACKAGES, solvers)
        for name in home.__all__
    ]
    makers += [getattr(Schedule, name) for name in get_args(ScheduleName)]
    makers += [SampleNoise, Problem.simulate, ScoreTraining]
    found = {}
    for make in makers:
        if make in OTHERS or isabstract(make) or not (isinstance(make, type) or make in NEEDED):
            continue
        for option in inspect.signature(make).parameters.values():
            kinds = set(re.findall(r"\b(?:int|float)\b", str(option.annotation)))
            if kinds and "Mapping" not in str(option.annotation):
                found[make.__qualname__, option.name] = (make, option.name, kinds == {"int"})
    return list(found.values())


def setup(made) -> None:
    """Look at the options of data, which do so when they are set up."""
    if isinstance(made, LightningDataModule):
        made.setup("predict")


@pytest.mark.parametrize(
    ("make", "option", "whole"),
    numbers(),
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_what_is_no_number_of_its_kind_is_refused(make, option, whole):
    wrong = [math.nan, "1x", True, *([2.5, math.inf] if whole else [])]
    for value in wrong:
        with pytest.raises(InputError, match=rf"{option} must be .*(number|count).* got "):
            setup(make(**NEEDED.get(make, {}) | {option: value}))


def test_numbers_at_the_ends_of_their_range_are_taken():
    assert len(numbers()) > 50
    PiGDM(prior_variance=math.inf), DiffPIR(prior_variance=math.inf)
    CMI(max_step=math.inf, min_signal=0, max_signal=1, budget=math.inf)
    DAPS(ode_steps=0, high=math.inf), DDIM(1), Renoise(0), CDPS(0), DPS(0), DPS(-1.0)
    SampleNoise(10**400, ["a"]), SampleNoise(-(10**400), ["a"])


OUT_OF_RANGE = {
    CADPS: {"shrink": 2.0},
    CDPS: {"fresh": 2.0},
    CMI: {"step_size": "gamma", "max_step": -1.0, "min_signal": 0.95, "max_signal": 1.5}
    | {"interval": 0, "budget": 0.0},
    DDIM: {"eta": 2.0},
    DDPM: {"variance": "tiny"},
    DSG: {"rate": 1.5, "interval": 0},
    DiffPIR: {"weight": 0.0},
    Discrepancy: {"factor": 0.0},
    FPS: {"particles": 0},
    LAMP: {"warmup": 0},
    MCG: {"level": "later"},
    PiGDM: {"weight": "heavy", "prior_variance": 0.0},
    REDDiff: {"rate": 0.0},
    Renoise: {"zeta": 1.5},
    Resampled: {"jump": 0, "repeats": 0},
    SITCOM: {"iterations": 0},
    information.ImageProbes: {"krylov": 0},
    information.Lanczos: {"derivative": "magic", "probes": 0, "krylov": 0},
    information.Ridge: {"delta": -1.0},
    information.TraceLimit: {"delta": math.inf},
    information.TwoTraces: {"floor": 0.0},
}


@pytest.mark.parametrize("cls", OUT_OF_RANGE, ids=lambda cls: cls.__name__)
def test_what_is_out_of_range_is_named(cls):
    for option, value in OUT_OF_RANGE[cls].items():
        with pytest.raises(InputError, match=rf"{cls.__name__}\.{option}"):
            cls(**NEEDED.get(cls, {}), **{option: value})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDRM(eta=1.5), "DDRM.eta must be a number, between 0 and 1, got 1.5"),
        (lambda: DAPS(ode_steps=-1), "DAPS.ode_steps must be a whole number, at least 0, got -1"),
        (lambda: DAPS(low=2.0, high=1.0), "DAPS.low must be below DAPS.high, got 2.0 and 1.0"),
        (lambda: DAPS(spread=0.0), "DAPS.spread must be a number, above 0 and finite, got 0.0"),
        (lambda: PnPDM(decay=1.0), "PnPDM.decay must be a number, above 0 and below 1, got 1.0"),
        (lambda: PnPDM(low=9.0, high=9.0), "PnPDM.low must be below PnPDM.high"),
        (lambda: DPMSolver("third"), "DPMSolver.kind must be one of midpoint, heun, sde, got 'thi"),
        (lambda: DPMSolver(order=3), "DPMSolver.order must be a whole number, between 1 and 2"),
        (
            lambda: Euler(1.0),
            "Euler.start_signal must be a number, at least 0 and below 1, got 1.0",
        ),
        (lambda: DiffPIR(prior_variance=0.0), "variance must be a number, above 0, got 0.0"),
        (lambda: DPS(math.inf), "DPS.scale must be a number, finite, got inf"),
        (lambda: CADPS("neither"), "CADPS.reading must be one of paper, code"),
        (lambda: CMI(budget=0.3, interval=6), r"CMI\.budget and CMI\.interval"),
        (lambda: Resampled(Resampled(DDPM(), 4, 3), 2, 2), "Resampled"),
        (lambda: LLE([[math.nan]], [[1.0]]), "LLE.seen must be a list of lists of numbers, finite"),
        (
            lambda: AsRGB(**NEEDED[AsRGB], channels=0),
            "AsRGB.channels must be a whole",
        ),
        (lambda: NetworkDenoiser(**NEEDED[NetworkDenoiser], value_range=(1, 1)), "smallest, larg"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("solver", "guidances"),
    [
        *((s, [DPS()]) for s in (DDPM(), Heun(), DAPS(), DAPS(0), DAPS(3, 0.5), DPMSolver())),
        *((s, []) for s in (PnPDM(inner=7), FPS(3), REDDiff(), DDRM())),
        (Resampled(Heun(), 2, 2), [MomentMatching(2)]),
        (Heun(), [MomentMatching(1), PiGDM(), TMPD()]),
        (DDPM(), [MomentMatching(), DSG(), DSG(interval=3), MCG(0.0), PiGDM(weight="posterior")]),
        (DDIM(), [AnnealedDPS(), CADPS(probes=2), CADPS("code"), Discrepancy(MCG(), 1e-6)]),
        (Renoise(), [SITCOM(3, 1e-9)]),
        (Renoise(), [DDNM(), LAMP(), DMPS(), CDPS(), DiffPIR()]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else f"{len(value)}",
)
def test_a_chain_costs_what_solver_and_guidances_say(mixture, dense, solver, guidances):
    """So that a budget is a share of all that the network is asked for."""
    told = []

    class Spy(Guidance):
        differentiable = False

        def for_chain(self, schedule, passes):
            told.append(passes)
            return self

    noise, like = SampleNoise(0, ["a"]), torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    problem = Problem(torch.ones(1, 3, dtype=torch.float64), dense, 0.1)
    sampler = Sampler(mixture, solver, [*guidances, Spy()], 7, clamp=False)
    *_, record = sampler.iterate(problem, noise, like)
    assert record.forwards + record.vjps == solver.repeats * told[0]
