"""Schedules, DDPM and DDIM against diffusers' schedulers, steps and whole trajectories.

Both see the same network: the exact ε, v or x̂₀ of a mixture, so that trajectories stay where images
are. diffusers keeps ᾱ in float32. Where a test says "in float64", its table is replaced by the same
table computed in float64 from the definition; all else is as it ships. Noise is ours in both.
"""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from conftest import randn
from reference_problems import BATCH, IDS, SHAPE, per_row
from torch import Tensor, nn

from cmi_lightning.denoisers import NetworkDenoiser
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.schedule import CLEAN, Schedule
from cmi_lightning.solvers import DDIM, DDPM, DPMSolver, Solver
from cmi_lightning.step import Step

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'cmi-lightning[reference]'")
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

Prediction = Literal["epsilon", "x0", "v"]
Variance = Literal["small", "large", "learned"]
NAMES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
NOISE = SampleNoise(0, IDS)
SCHEDULE = Schedule.linear()

predictions = pytest.mark.parametrize("prediction", list(NAMES))
variances = pytest.mark.parametrize("variance", ["small", "large", "learned"])
clipping = pytest.mark.parametrize("clip", [False, True])


class Network(nn.Module):
    """What a perfect network says of x_t, and perhaps a variance, values beyond ±1 included."""

    def __init__(self, prediction: Prediction, learn_variance: bool) -> None:
        super().__init__()
        # Images beyond ±1, so that clipping has something to do.
        self.prior = GaussianMixture(0.5 * randn(3, *SHAPE, seed=1), 1.0)
        self.prediction, self.learn_variance = prediction, learn_variance

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        level = SCHEDULE[int(times[0])]
        x0 = self.prior(x, level).x0
        epsilon = (x - level.alpha * x0) / level.sigma
        output = {"x0": x0, "epsilon": epsilon, "v": level.alpha * epsilon - level.sigma * x0}
        said = output[self.prediction]
        return torch.cat([said, 1.2 * torch.sin(3 * x)], 1) if self.learn_variance else said


def denoiser_of(prediction: Prediction, learn_variance: bool = False) -> NetworkDenoiser:
    return NetworkDenoiser(Network(prediction, learn_variance), None, prediction=prediction)


def said(denoiser: NetworkDenoiser, x: Tensor, t: int) -> Tensor:
    """The network's output."""
    output: Tensor = denoiser.network(x, torch.full((len(x),), t))
    return output


def exact(scheduler: Any) -> Any:
    """Put ᾱ in float64 from the definition into a scheduler of the default betas."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    return scheduler


def ddpm(prediction: Prediction, variance: Variance, clip: bool) -> DDPMScheduler:
    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    return DDPMScheduler(
        prediction_type=NAMES[prediction],
        variance_type=kind,
        clip_sample=clip,
    )


def ddim(prediction: Prediction, clip: bool, spacing: str = "leading") -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type=NAMES[prediction],
        clip_sample=clip,
        timestep_spacing=spacing,
    )


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make DDPMScheduler's next noise ours of a step."""

    def feed_step(index: int) -> None:
        def noise(shape: Any, *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
            like = torch.empty(BATCH, *SHAPE, dtype=dtype)
            return NOISE.normal("solver", index, like)

        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)

    return feed_step


def our_step(
    denoiser: NetworkDenoiser, solver: Solver, x: Tensor, t: int, s: int | None, clip: bool
) -> Tensor:
    now, then = SCHEDULE[t], CLEAN if s is None else SCHEDULE[s]
    problem = Problem(x, Identity(), 1.0)
    step = Step(0, x, now, then, problem, denoiser, NOISE, differentiable=False)
    return Sampler(denoiser, solver, clamp=clip).advance(step)


def our_trajectory(
    denoiser: NetworkDenoiser, solver: Solver, num_steps: int | str, clip: bool, like: Tensor
) -> tuple[Sampler, list[Tensor]]:
    """The sampler, and x_N, x_{N−1}, …, x₀ of a run of it."""
    sampler = Sampler(denoiser, solver, num_steps=num_steps, clamp=clip)
    problem = Problem(like, Identity(), 1.0)
    path = [record.x for record in sampler.iterate(problem, NOISE, like)]
    top = sampler.schedule[len(sampler.schedule) - 1]
    return sampler, [solver.start(top, problem, NOISE, like), *path]


# Schedules.


@pytest.mark.parametrize("levels", [1000, 50])
@pytest.mark.parametrize("ours", ["linear", "cosine"])
def test_alphas_cumprod(ours, levels):
    """ᾱ, to the float32 of diffusers: its 1 − β is wrong by up to 6e-8, and ends at 1e-3 in the
    cosine chain (β is capped at 0.999).
    """
    schedule = getattr(Schedule, ours)(levels)
    abar = torch.tensor(schedule.alphas, dtype=torch.float64) ** 2
    theirs, tolerance = {"linear": ("linear", 1e-6), "cosine": ("squaredcos_cap_v2", 6e-5)}[ours]
    scheduler = DDPMScheduler(num_train_timesteps=levels, beta_schedule=theirs)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), abar, rtol=tolerance, atol=0)
    assert torch.equal(torch.tensor(schedule.times), torch.arange(levels))


@pytest.mark.parametrize("count", [2, 10, 20, 37, 50, 100, 250, 1000])
def test_respacing_is_its_linspace(count):
    """guided-diffusion's rule, which adds up a float, and diffusers' numpy.linspace, rounded."""
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(count)
    assert list(SCHEDULE.respace(count).times) == scheduler.timesteps.flip(0).tolist()


@pytest.mark.parametrize("count", [1, 10, 20, 25, 50, 125, 500])
def test_ddim_respacing_is_its_leading(count):
    """guided-diffusion's "ddimK" for a K that divides the chain."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(count)
    assert list(SCHEDULE.respace(f"ddim{count}").times) == scheduler.timesteps.flip(0).tolist()


# Trajectories.

LIKE = torch.empty(BATCH, *SHAPE, dtype=torch.float64)
tables = pytest.mark.parametrize(
    ("table", "tolerance"), [(exact, 1e-9), (lambda scheduler: scheduler, 1e-5)], ids=["64", "32"]
)


@predictions
@variances
@clipping
@pytest.mark.parametrize("num_steps", [10, 37, "ddim25", "5,15"])
@tables
def test_ddpm_trajectory(feed, prediction, variance, clip, num_steps, table, tolerance):
    """Every x of a run, our times given to diffusers; ᾱ in float64 and as diffusers ships."""
    denoiser = denoiser_of(prediction, variance == "learned")
    sampler, (x, *path) = our_trajectory(denoiser, DDPM(variance), num_steps, clip, LIKE)
    scheduler = table(ddpm(prediction, variance, clip))
    scheduler.set_timesteps(timesteps=[int(time) for time in reversed(sampler.schedule.times)])
    for index, t, ours in zip(reversed(range(len(path))), scheduler.timesteps, path, strict=True):
        feed(index)
        x = scheduler.step(said(denoiser, x, int(t)), int(t), x).prev_sample
        assert per_row(ours, x) < tolerance


@predictions
@clipping
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [10, 25, 100])
@tables
def test_ddim_trajectory(prediction, clip, eta, count, table, tolerance):
    """Every x of a run, with "leading" timesteps and set_alpha_to_one, diffusers' defaults."""
    denoiser = denoiser_of(prediction)
    _, (x, *path) = our_trajectory(denoiser, DDIM(eta), f"ddim{count}", clip, LIKE)
    scheduler = table(ddim(prediction, clip))
    scheduler.set_timesteps(count)
    for index, t, ours in zip(reversed(range(count)), scheduler.timesteps, path, strict=True):
        x = scheduler.step(
            said(denoiser, x, int(t)),
            int(t),
            x,
            eta=eta,
            use_clipped_model_output=clip,
            variance_noise=NOISE.normal("solver", index, x),
        ).prev_sample
        assert per_row(ours, x) < tolerance


def test_noise_is_what_generators_of_ours_give_diffusers():
    """In float32, with a generator for each sample through diffusers' own argument."""
    denoiser = denoiser_of("epsilon").float()
    sampler, (x, *path) = our_trajectory(denoiser, DDPM(), 10, False, LIKE.float())
    scheduler = ddpm("epsilon", "small", False)
    scheduler.set_timesteps(timesteps=[int(time) for time in reversed(sampler.schedule.times)])
    for index, t, ours in zip(reversed(range(10)), scheduler.timesteps, path, strict=True):
        generators = [NOISE.generator(row, "solver", index) for row in range(BATCH)]
        output = said(denoiser, x, int(t))
        x = scheduler.step(output, int(t), x, generator=generators).prev_sample
        assert per_row(ours, x) < 1e-5


# Where diffusers does something else.


def test_ddim_of_diffusers_knows_one_stride():
    """Its DDIM steps to t − 1000//K, whichever time it visits next, so that "linspace" goes wrong.

    With 7 steps 333 is followed by 166; the step that it makes goes to 191.
    """
    denoiser, scheduler = denoiser_of("epsilon"), exact(ddim("epsilon", False, "linspace"))
    scheduler.set_timesteps(7)
    assert scheduler.timesteps[4:].tolist() == [333, 166, 0]
    x = randn(BATCH, *SHAPE)
    theirs = scheduler.step(said(denoiser, x, 333), 333, x).prev_sample
    assert per_row(our_step(denoiser, DDIM(), x, 333, 191, False), theirs) < 1e-9
    assert per_row(our_step(denoiser, DDIM(), x, 333, 166, False), theirs) > 1e-2


def test_ddpm_of_diffusers_may_end_in_noise(feed):
    """Its last step adds none where t = 0; "trailing" times end at t = 99, and there it adds √β z.

    Ours (and Ho et al., Alg. 2) adds none in the step to the clean image, whatever its t.
    """
    feed(0)
    denoiser, scheduler = denoiser_of("epsilon"), exact(ddpm("epsilon", "large", False))
    scheduler.set_timesteps(timesteps=[999, 99])
    x = randn(BATCH, *SHAPE)
    theirs = scheduler.step(said(denoiser, x, 99), 99, x).prev_sample
    ours = our_step(denoiser, DDPM("large"), x, 99, None, False)
    assert per_row(ours, denoiser(x, SCHEDULE[99]).x0) < 1e-9
    assert per_row(theirs - ours, SCHEDULE[99].sigma * NOISE.normal("solver", 0, x)) < 1e-9


def test_ddim_of_diffusers_keeps_the_networks_epsilon_where_it_clips():
    """By default x̂₀ is clipped and ε̂ is not its own: they no longer add up to x_t.

    Ours takes ε̂ = (x_t − α x̂₀)/σ of the clipped x̂₀, as diffusers does when asked to.
    """
    denoiser, scheduler = denoiser_of("epsilon"), exact(ddim("epsilon", True))
    scheduler.set_timesteps(10)
    x, t, s = randn(BATCH, *SHAPE), 500, 400
    output = said(denoiser, x, t)
    step = scheduler.step(output, t, x)
    now, then = SCHEDULE[t], SCHEDULE[s]
    clipped = denoiser(x, now).x0.clamp(-1, 1)
    assert per_row(step.prev_sample, then.alpha * clipped + then.sigma * output) < 1e-9
    epsilon = (x - now.alpha * clipped) / now.sigma
    ours = our_step(denoiser, DDIM(), x, t, s, True)
    assert per_row(ours, then.alpha * clipped + then.sigma * epsilon) < 1e-9
    assert per_row(ours, step.prev_sample) > 1e-3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["midpoint", "heun", "sde"])
def test_dpm_solver_trajectory(kind):
    """Every x of a run of DPMSolverMultistepScheduler on our levels.

    Its last step, to σ = 0, is of first order and ends at x̂₀, as ours.
    """
    denoiser, like = denoiser_of("epsilon"), randn(BATCH, *SHAPE)
    sampler, ours = our_trajectory(denoiser, DPMSolver(kind), 12, False, like)
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++" if kind == "sde" else "dpmsolver++",
        solver_type="midpoint" if kind == "sde" else kind,
        final_sigmas_type="zero",
        lower_order_final=False,
    )
    levels = [level for _, level, _ in sampler.schedule.pairs()]
    theirs.set_timesteps(len(levels))
    theirs.timesteps = torch.tensor([level.time for level in levels])
    theirs.sigmas = torch.tensor([*(v.sigma / v.alpha for v in levels), 0.0]).double()
    x = ours[0]
    for step, level in enumerate(levels):
        noise = NOISE.normal("solver", len(levels) - 1 - step, like)
        x = theirs.step(
            said(denoiser, x, int(level.time)), level.time, x, variance_noise=noise
        ).prev_sample
        assert per_row(ours[step + 1], x.double()) < 1e-5, step
