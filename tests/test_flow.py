"""Flow matching: straight paths, velocities, exact posteriors on them, a network trained here."""

import pytest
import torch
from conftest import numbered, randn
from torch import Tensor, nn

from cmi_lightning import Problem, Sampler
from cmi_lightning.denoisers import EDMDenoiser, NetworkDenoiser
from cmi_lightning.errors import InputError
from cmi_lightning.exact import DenseCovariance, GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Dense
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers import DDIM, DDPM, Renoise
from cmi_lightning.training import ScoreTraining

FLOW = Schedule.rectified()


def test_levels_lie_on_straight_paths():
    assert (len(FLOW), FLOW.times[0], FLOW.times[-1]) == (999, 1.0, 999.0)
    for schedule in (FLOW, Schedule.rectified(50, shift=3.0, time_scale=1)):
        for level in schedule:
            assert level.alpha + level.sigma == pytest.approx(1, abs=1e-12)
    shifted = Schedule.rectified(shift=3.0)  # σ/α is three times as large
    for a, b in zip(shifted, FLOW, strict=True):
        assert a.sigma / a.alpha == pytest.approx(3 * b.sigma / b.alpha)
    for wrong in ({"t_max": 1.0}, {"t_min": 0.0}, {"t_min": 0.5, "t_max": 0.4}):
        with pytest.raises(InputError, match="0 < t_min < t_max < 1, got"):
            Schedule.rectified(**wrong)
    with pytest.raises(InputError, match=r"shift must be a number, above 0 and finite, got 0.0"):
        Schedule.rectified(shift=0.0)


def test_a_velocity_of_another_path_is_refused():
    for schedule in ("linear", "edm", Schedule.vp()):
        with pytest.raises(InputError, match=r"straight paths.*set schedule to rectified"):
            NetworkDenoiser(lambda x, t: x, None, schedule, "velocity")
        with pytest.raises(InputError, match="straight paths"):
            ScoreTraining(nn.Identity(), schedule, prediction="velocity")


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_the_velocity_of_a_normal_image(value_range):
    # x₀ ~ N(m, v) in the network's range: E[ε − x₀ | x_t] in closed form, with another derivation
    # than the denoiser's: the joint Gaussian of (ε − x₀, x_t).
    low, high = value_range
    gain, m, v = (high - low) / 2, (high + low) / 2 + 0.1, 0.04

    def network(x, times):
        t = times[0].item() / 1000
        gain_v = (t - (1 - t) * v) / ((1 - t) ** 2 * v + t**2)
        return -m + gain_v * (x - (1 - t) * m)

    denoiser = NetworkDenoiser(network, None, FLOW, "velocity", value_range=value_range)
    exact = GaussianPrior(torch.full((1, 2, 2), 0.1 / gain).double(), v / gain**2)
    for index in (0, 300, 700, 998):
        x = randn(3, 1, 2, 2, seed=index)
        level = denoiser.schedule[index]
        torch.testing.assert_close(denoiser(x, level).x0, exact(x, level).x0, rtol=1e-5, atol=1e-6)


ROOT = randn(6, 6, seed=1) / 2
MEAN, COVARIANCE, MATRIX = randn(6, seed=2), ROOT @ ROOT.T + 0.05, randn(3, 6, seed=3)


def gaussian(schedule: Schedule) -> tuple[GaussianPrior, Dense]:
    prior = GaussianPrior(MEAN, DenseCovariance(COVARIANCE), schedule)
    return prior, Dense(MATRIX, (6,))


@pytest.mark.parametrize(
    "guidance",
    [DPS(0.3), DSG(0.1), PiGDM(), MCG(), MomentMatching(), CMI(0.1, interval=1)],
    ids=repr,
)
def test_guidances_run_on_straight_paths(guidance):
    prior, A = gaussian(FLOW)
    x0, noise = randn(2, 6, seed=4), SampleNoise(0, ["a", "b"])
    problem = Problem.simulate(x0, A, 0.3, noise)
    runs = []
    for guidances in ([guidance], []):
        sampler = Sampler(prior, DDPM(), guidances, num_steps=40, clamp=False)
        *_, last = sampler.iterate(problem, noise, x0)
        runs.append(last)
    assert bool((runs[0].stopped == 0).all())
    if not isinstance(guidance, CMI):  # a Gaussian prior's CMI has no gradient
        assert bool((runs[0].log["residual"] < runs[1].log["residual"]).all())


def test_euler_on_a_straight_path_is_ddim():
    prior, A = gaussian(FLOW)
    noise, x = SampleNoise(0, ["a"]), randn(1, 6)
    sampler = Sampler(prior, DDIM(0.0), num_steps=25, clamp=False)
    ours = sampler.run(Problem(A(x), A, 0.1), noise, x)
    state = sampler.solver.start(sampler.schedule[24], Problem(A(x), A, 0.1), noise, x)
    for _, t, s in sampler.schedule.pairs():
        x0 = prior(state, t).x0
        velocity = (state - t.alpha * x0) / t.sigma - x0
        state = state + (s.sigma - t.sigma) * velocity
    torch.testing.assert_close(ours, state, rtol=1e-9, atol=1e-9)


class Affine(nn.Module):
    """u = a(t) x + b(t) with a, b polynomials in t: enough for one Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, 6))

    def forward(self, x, times):
        t = times[:, None] / 1000
        powers = torch.cat([t**k for k in range(6)], dim=1)
        a, b = (powers @ self.weights.T)[:, :, None, None, None].unbind(1)
        return a * x + b


def test_a_flow_network_trained_here_samples():
    torch.manual_seed(0)
    module = ScoreTraining(Affine(), "rectified", prediction="velocity")
    optimizer = torch.optim.LBFGS(module.network.parameters(), 1, 60)
    x0 = 0.3 + 0.5 * torch.randn(2000, 1, 2, 2)
    indices, noise = torch.randint(0, 999, (2000,)), torch.randn(2000, 1, 2, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(x0, indices, noise)
        loss.backward()
        return loss

    optimizer.step(closure)
    prior = NetworkDenoiser(module.network, None, "rectified", "velocity", (1, 2, 2))
    like = torch.zeros(1000, 1, 2, 2)
    sampler = Sampler(prior, DDIM(0.0), num_steps=20, clamp=False)
    y = Problem(like.flatten(1), Dense(torch.eye(4), (1, 2, 2)), 1.0)
    found = sampler.run(y, numbered(1000), like)
    assert float(found.mean()) == pytest.approx(0.3, abs=0.06)
    assert float(found.std()) == pytest.approx(0.5, abs=0.06)


class Known(nn.Module):
    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x, times):
        return self.answer


def test_velocity_is_validated_by_the_error_of_the_noise():
    module = ScoreTraining(nn.Identity(), "rectified", prediction="velocity")
    x0, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.manual_seed(0))
    for index in (0, 500, 998):
        level, levels = FLOW[index], torch.full((4,), index)
        module.network = Known(noise - x0 + 0.2)
        module.train()
        assert float(module.loss(x0, levels, noise)) == pytest.approx(0.04, rel=1e-3)
        module.eval()  # ε̂ = x_t + α û
        x = level.alpha * x0 + level.sigma * noise
        error = (x + level.alpha * (noise - x0 + 0.2) - noise).square().mean()
        assert float(module.loss(x0, levels, noise)) == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_consistency_model_is_a_prior_of_few_steps(num_steps):
    # Of N(0, v) the probability flow's end point from (x, σ) is x √(v/(v + σ²)), whatever σ.
    v = 0.25

    def consistency(x, sigma):
        return x * (v / (v + sigma[:, None] ** 2)).sqrt()

    schedule = Schedule.edm(num_steps, 0.5, 80.0)
    prior = EDMDenoiser(consistency, None, schedule)
    noise, like = numbered(4000), torch.zeros(4000, 1)
    problem = Problem(like, Dense(torch.eye(1), (1,)), 1.0)
    found = Sampler(prior, Renoise(1.0), clamp=False).run(problem, noise, like)
    assert float(found.std()) == pytest.approx(v**0.5, rel=0.04)
    assert prior(torch.ones(1, 1), Level(1.0, 80.0, 80.0)).x0.shape == (1, 1)
