"""Solvers and guidances against azula, in float64.

azula's times are mapped to our levels by a table: t = i + 1 is level i, and t = 0 the clean image.
Its samplers draw with torch.randn_like, which is made to return our noise.
"""

import pytest
import torch
from conftest import make_step
from reference_problems import BATCH, IDS, SHAPE, bound, mixture, per_row, problem_step
from torch import Tensor

from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import (
    DPS,
    TMPD,
    DiffPIR,
    Guidance,
    MomentMatching,
    PiGDM,
    residual_gradient,
)
from cmi_lightning.linalg import norm, per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import Schedule
from cmi_lightning.solvers import DDIM, DDPM, DPMSolver, Heun, Solver
from cmi_lightning.step import Step

pytest.importorskip("azula", reason="needs azula: pip install 'cmi-lightning[reference]'")
import azula.denoise
import azula.sample
from azula.guidance.diffpir import DiffPIRDenoiser
from azula.guidance.dps import DPSSampler
from azula.guidance.mmps import MMPSDenoiser
from azula.guidance.pgdm import PGDMSampler
from azula.guidance.tmpd import TMPDenoiser
from azula.linalg.covariance import DiagonalCovariance

STEPS = 12


class Table:
    """Our levels as an azula schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.alpha = torch.tensor([1.0, *schedule.alphas], dtype=torch.float64)
        self.sigma = torch.tensor([0.0, *schedule.sigmas], dtype=torch.float64)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.round().long()
        return self.alpha[index], self.sigma[index]


class Prior(azula.denoise.Denoiser):
    """One of our priors as an azula denoiser, on a chain of its own."""

    def __init__(self, prior: GaussianMixture, schedule: Schedule) -> None:
        super().__init__()
        self.prior, self.levels, self.schedule = prior, schedule, Table(schedule)

    def forward(self, x_t: Tensor, t: Tensor) -> azula.denoise.DiracPosterior:
        level = self.levels[int(t.round()) - 1]
        return azula.denoise.DiracPosterior(self.prior(x_t, level).x0)


def spaced(kind: str) -> Schedule:
    return Schedule.named(kind).respace(STEPS)


def our_path(
    solver: Solver,
    guidances: list[Guidance],
    schedule: Schedule,
    problem: Problem,
    noise: SampleNoise,
) -> list[Tensor]:
    """x_N, x_{N−1}, …, x₀."""
    prior = mixture(schedule)
    sampler = Sampler(prior, solver, guidances)
    like = torch.empty(len(noise.ids), *SHAPE, dtype=torch.float64)
    path = [record.x for record in sampler.iterate(problem, noise, like)]
    top = sampler.schedule[len(sampler.schedule) - 1]
    return [solver.start(top, problem, noise, like), *path]


def their_path(
    sampler: azula.sample.Sampler,
    x: Tensor,
    noise: SampleNoise,
    monkeypatch: pytest.MonkeyPatch,
    last: int = 0,
) -> list[Tensor]:
    path = [x]
    for t in range(STEPS, last, -1):
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "randn_like", lambda like, t=t: noise.normal("solver", t - 1, like)
            )
            x = sampler.step(x, torch.tensor(float(t)), torch.tensor(float(t - 1)))
        path.append(x)
    return path


def simulate(name: str, batch: int, std: float, schedule: Schedule) -> tuple[Problem, SampleNoise]:
    ids = IDS[:batch]
    noise = SampleNoise(0, ids)
    images = mixture(schedule).sample(batch, torch.Generator().manual_seed(0))
    return Problem.simulate(images, bound(name, ids=ids), std, noise), noise


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm"])
@pytest.mark.parametrize(
    ("solver", "theirs"),
    [
        (DDPM(), azula.sample.DDPMSampler),
        (DDIM(0.0), azula.sample.DDIMSampler),
        (DDIM(0.5), lambda prior: azula.sample.DDIMSampler(prior, eta=0.25)),
        (DDIM(1.0), lambda prior: azula.sample.DDIMSampler(prior, eta=1.0)),
        (DDIM(0.0), azula.sample.EulerSampler),
        (Heun(), azula.sample.HeunSampler),
    ],
    ids=["ddpm", "ddim-0", "ddim-0.5", "ddim-1", "euler", "heun"],
)
def test_unguided_trajectory(monkeypatch, schedule, solver, theirs):
    """Every x of a run. azula's η multiplies the variance: η_azula = η².

    Heun's last step, to σ = 0, is Euler's here and divides by σ = 0 there: it is left out.
    """
    levels = spaced(schedule)
    problem, noise = simulate("identity", BATCH, 1.0, levels)
    ours = our_path(solver, [], levels, problem, noise)
    last = int(isinstance(solver, Heun))
    path = their_path(theirs(Prior(mixture(), levels)), ours[0], noise, monkeypatch, last)
    assert len(path) == len(ours) - last
    for a, b in zip(ours, path, strict=False):
        assert per_row(a, b) < 1e-9


@pytest.mark.parametrize(
    "name", ["identity", "box", "gaussian-reflect", "downsample", "hdr", "phase-retrieval"]
)
@pytest.mark.parametrize("schedule", ["linear", "edm"])
def test_dps_trajectory_of_one_image(monkeypatch, name, schedule):
    """Every x of a run of DDPM with ζ ∇‖y − A x̂₀‖ subtracted, for a batch of one."""
    levels = spaced(schedule)
    problem, noise = simulate(name, 1, 0.2, levels)
    ours = our_path(DDPM(), [DPS(0.3)], levels, problem, noise)
    sampler = DPSSampler(Prior(mixture(), levels), problem.y, problem.operator, zeta=0.3)
    for a, b in zip(ours, their_path(sampler, ours[0], noise, monkeypatch), strict=True):
        assert per_row(a, b) < 1e-9


def test_dps_of_azula_couples_the_batch(monkeypatch):
    """It takes one norm over the batch: row b moves ‖r_b‖/‖r‖ times as far as it would alone."""
    levels = spaced("linear")
    index = 6
    step = make_step(mixture(levels), bound("box"), index, BATCH, 0.2)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    t, s = torch.tensor(index + 1.0), torch.tensor(float(index))
    prior = Prior(mixture(), levels)
    x = step.x.detach()
    plain = azula.sample.DDPMSampler(prior).step(x, t, s)
    guided = DPSSampler(prior, step.problem.y, step.problem.operator).step(x, t, s)
    residual = norm(step.residual.detach())
    share = per_sample(residual / residual.norm(), x)
    assert float(share.max()) < 0.8
    assert per_row(guided - plain, -share * residual_gradient(step)) < 1e-9


@pytest.mark.parametrize("name", ["identity", "pixels", "box", "downsample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_pigdm_trajectory_without_noise(monkeypatch, name, eta):
    """Every x of a run with Σ_n = 0, where g = Jᵀ A⁺(y − A x̂₀) and w = α_s α_t in both."""
    levels = spaced("linear")
    problem, noise = simulate(name, BATCH, 0.0, levels)
    ours = our_path(DDIM(eta), [PiGDM()], levels, problem, noise)
    operator = problem.operator
    sampler = PGDMSampler(Prior(mixture(), levels), problem.y, operator, operator.pinv, eta=eta**2)
    for a, b in zip(ours, their_path(sampler, ours[0], noise, monkeypatch), strict=True):
        assert per_row(a, b) < 1e-9


def their_denoised(step: Step, iterations: int) -> Tensor:
    """E[x₀ | x_t, y] of azula. Its measurements are vectors (B, m), with one Σ_n for the batch."""
    operator, y = step.problem.operator, step.problem.y.flatten(1)
    denoiser = MMPSDenoiser(
        Prior(mixture(), Schedule.linear()),
        y,
        lambda x: operator(x).flatten(1),
        DiagonalCovariance((step.problem.std**2).expand_as(step.problem.y)[0].flatten()),
        solver="cg",
        iterations=iterations,
    )
    mean: Tensor = denoiser(step.x.detach(), torch.tensor(step.index + 1.0)).mean
    return mean


def our_denoised(step: Step, krylov: int) -> Tensor:
    return MomentMatching(krylov).guide_denoised(step, step.x0.detach())


# PyTorch's own torch.func.jvp, with which azula applies A, calls a deprecated function of PyTorch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("index", [20, 700])
def test_moment_matching_in_a_few_iterations(iterations, index):
    """Our Krylov space of dimension k gives what k iterations of conjugate gradients do.

    For one noise level, that is; for several, ours is the space of the whitened measurements.
    """
    step = problem_step("gaussian-reflect", index)
    x0 = step.x0.detach()
    expected = their_denoised(step, iterations) - x0
    assert per_row(our_denoised(step, iterations) - x0, expected) < 1e-9
    assert per_row(our_denoised(step, iterations + 1) - x0, expected) > 1e-8


@pytest.mark.parametrize("name", ["identity", "pixels", "box", "downsample"])
@pytest.mark.parametrize("index", [20, 300, 700])
def test_tmpd(name, index):
    """x̂₀ with row sums for A Σ Aᵀ, where none of them is negative; where one is, ours counts 0."""
    step = problem_step(name, index)
    problem, levels = step.problem, Schedule.linear()
    theirs = TMPDenoiser(Prior(mixture(), levels), problem.y, problem.operator, problem.std**2)
    moved = TMPD().guide_denoised(step, step.x0.detach())
    expected = theirs(step.x.detach(), torch.tensor(index + 1.0)).mean
    alike = step.log["tmpd/negative"] == 0
    assert bool(alike.any())
    assert per_row((moved - step.x0.detach())[alike], (expected - step.x0.detach())[alike]) < 1e-9


class Flat(Prior):
    """A prior on vectors (B, n), over which azula's solvers sum."""

    def forward(self, x_t: Tensor, t: Tensor) -> azula.denoise.DiracPosterior:
        image = super().forward(x_t.unflatten(1, SHAPE), t).mean
        return azula.denoise.DiracPosterior(image.flatten(1))


@pytest.mark.parametrize("name", ["identity", "box", "gaussian-reflect", "downsample"])
@pytest.mark.parametrize("weight", [1.0, 7.0])
def test_diffpir(name, weight):
    """The proximal point, by our closed forms and by azula's conjugate gradients to the end."""
    step = problem_step(name, 400)
    operator, y = step.problem.operator, step.problem.y.flatten(1)
    theirs = DiffPIRDenoiser(
        Flat(mixture(), Schedule.linear()),
        y,
        lambda x: operator(x.unflatten(1, SHAPE)).flatten(1),
        float(step.problem.std) ** 2,
        lmbda=weight,
        solver="cg",
        iterations=40,
    )
    x0 = step.x0.detach()
    moved = DiffPIR(weight).guide_denoised(step, x0) - x0
    expected = theirs(step.x.detach().flatten(1), torch.tensor(401.0)).mean.unflatten(1, SHAPE)
    assert per_row(moved, expected - x0) < 1e-6


def test_dpm_solver_heun_is_exponential_adams_bashforth(monkeypatch):
    """Every x but the last, whose step to σ = 0 azula extrapolates too."""
    levels = spaced("linear")
    problem, noise = simulate("identity", BATCH, 1.0, levels)
    ours = our_path(DPMSolver("heun"), [], levels, problem, noise)
    sampler = azula.sample.xEABSampler(Prior(mixture(), levels), order=2, start=1.0, stop=0.0)
    coefficients = sampler._exponential_adams_bashforth
    ratio = [levels.sigmas[i] / levels.alphas[i] for i in reversed(range(STEPS))]
    t = torch.tensor(ratio).double().log()
    x, before, prior = ours[0], None, mixture()
    for k in range(STEPS - 1):
        level, below = levels[STEPS - 1 - k], levels[STEPS - 2 - k]
        x0 = prior(x, level).x0
        if before is not None:
            c = coefficients(t, i=k, n=2)
            total = c[0] * before + c[1] * x0
        else:
            total = coefficients(t, i=k, n=1)[0] * x0
        x = below.alpha * (ratio[k + 1] / ratio[k] * x / level.alpha - ratio[k + 1] * total)
        before = x0
        assert per_row(ours[k + 1], x) < 1e-7
