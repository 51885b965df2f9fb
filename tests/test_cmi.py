"""CMI against dense float64 computations on exact priors."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import SHAPE, AllSigns, dense_information, jacobian, make_step
from torch import Tensor

from cmi_lightning import Sampler
from cmi_lightning.errors import InputError
from cmi_lightning.exact import GaussianMixture, GaussianPrior, power_law_prior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM
from cmi_lightning.information import ImageProbes, Lanczos, Ridge, TraceLimit, TwoTraces
from cmi_lightning.information.base import SECOND_ORDER
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import BoxMask, Dense, PixelMask
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level, Schedule
from cmi_lightning.solvers import DDPM, Resampled
from cmi_lightning.step import Step


@pytest.mark.parametrize("index", [30, 300, 600])
@pytest.mark.parametrize("per_measurement", [False, True])
@pytest.mark.parametrize(
    "estimator",
    [
        Lanczos(probes=4, krylov=3),
        Ridge(probes=4, krylov=3, delta=0.0),
        ImageProbes(probes=32, krylov=3),
        TwoTraces(probes=32, krylov=6, floor=1e-9),
    ],
    ids=lambda e: type(e).__name__,
)
def test_value_and_gradient_equal_the_dense_ones(mixture, dense, estimator, index, per_measurement):
    std = torch.tensor([[0.05, 0.1, 0.3]], dtype=torch.float64) if per_measurement else 0.1
    step = make_step(mixture, dense, index, sigma=std)
    step.noise = AllSigns(step.noise)  # exhausts the probes: the estimate has no variance left
    information = estimator(step)
    for row in range(4):
        value, gradient = dense_information(step, row, std)
        assert information.value[row] == pytest.approx(float(value), rel=1e-9)
        torch.testing.assert_close(
            information.gradient[row].flatten(), gradient, rtol=1e-7, atol=1e-8
        )
    assert float(information.residual.max()) < 1e-6


@pytest.mark.parametrize("schedule", [None, Schedule.edm()], ids=["linear", "edm"])
@pytest.mark.parametrize("delta", [0.3, 2.0])
def test_ridge_is_the_information_of_a_noisier_measurement(mixture, dense, delta, schedule):
    step = make_step(mixture, dense, 300 if schedule is None else 45, schedule=schedule)
    step.noise = AllSigns(step.noise)
    information = Ridge(probes=4, krylov=3, delta=delta)(step)
    alpha, sigma = step.t.alpha, step.t.sigma
    std = math.sqrt(0.1**2 + delta**2 * sigma**2 / (alpha**2 + sigma**2))
    for row in range(4):
        value, gradient = dense_information(step, row, std)
        assert information.value[row] == pytest.approx(float(value), rel=1e-9)
        torch.testing.assert_close(
            information.gradient[row].flatten(), gradient, rtol=1e-8, atol=1e-9
        )


@pytest.mark.parametrize("derivative", ["autograd", "difference"])
def test_trace_limit_is_the_gradient_of_the_trace(mixture, dense, derivative):
    step = make_step(mixture, dense, 300, sigma=0.1)
    step.noise = AllSigns(step.noise)
    information = TraceLimit(probes=4, delta=0.0, derivative=derivative)(step)
    tolerance = 1e-9 if derivative == "autograd" else 2e-2
    for row in range(4):
        value, gradient = dense_information(step, row, 0.1, lambda S: torch.trace(S) - len(S))
        assert information.value[row] == pytest.approx(float(value), rel=1e-9)
        error = (information.gradient[row].flatten() - gradient).norm() / gradient.norm()
        assert float(error) < tolerance


def test_trace_limit_is_the_limit_of_the_ridge(mixture, dense):
    step = make_step(mixture, dense, 300)
    ridge = Ridge(krylov=3, delta=300.0)(step)
    trace = TraceLimit(delta=300.0)(step)
    torch.testing.assert_close(ridge.gradient, trace.gradient, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(ridge.value, trace.value, rtol=1e-3, atol=1e-9)
    assert trace.residual is None


@pytest.mark.parametrize("derivative", ["autograd", "difference", "forward"])
@pytest.mark.parametrize(
    ("estimator", "passes"),
    [
        (Lanczos(krylov=3), {"autograd": (0, 5), "difference": (2, 5), "forward": (1, 4)}),
        (TraceLimit(), {"autograd": (0, 2), "difference": (2, 3), "forward": (1, 2)}),
        (ImageProbes(krylov=3), {"autograd": (0, 6), "difference": (2, 6), "forward": (1, 5)}),
        (TwoTraces(krylov=3), {"autograd": (0, 9), "difference": (2, 9), "forward": (1, 8)}),
    ],
    ids=["Lanczos", "TraceLimit", "ImageProbes", "TwoTraces"],
)
def test_cost_is_as_the_docstrings_say(mixture, dense, derivative, estimator, passes):
    step, estimator = make_step(mixture, dense, 300), replace(estimator, derivative=derivative)
    _ = step.x0
    estimator(step)
    forwards, products = passes[derivative]
    assert (step.cost.forwards - 1, step.cost.vjps) == (forwards, products)
    assert estimator.derivatives == (2 if derivative == "autograd" else 1)
    weight = SECOND_ORDER - 1 if derivative == "autograd" else 0
    assert estimator.passes() == forwards + products + weight


def test_random_probes_are_unbiased(mixture, dense):
    step = make_step(mixture, dense, 300, batch=1)
    estimates = []
    for k in range(400):
        step.index = k  # another index, other probes; level and point stay
        estimates.append(Lanczos(krylov=3)(step).gradient[0].flatten())
    estimates = torch.stack(estimates)
    _, exact = dense_information(step, 0, 0.1)
    error = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(len(estimates)))
    assert float(error.abs().max()) < 4


@pytest.mark.parametrize(("derivative", "error"), [("difference", 5e-3), ("forward", 0.1)])
@pytest.mark.parametrize("make", [Lanczos, ImageProbes, TwoTraces, TraceLimit])
def test_differences_agree_with_autograd(mixture, dense, make, derivative, error):
    step = make_step(mixture, dense, 300)
    exact = make()(step).gradient
    approximate = make(derivative=derivative)(step).gradient
    assert float((norm(exact - approximate) / norm(exact)).max()) < error


@pytest.mark.parametrize("derivative", ["autograd", "difference"])
def test_a_sample_that_measures_nothing_has_no_gradient(derivative):
    prior = power_law_prior([1, 256, 256])
    noise = SampleNoise(0, ["a", "b"])
    known = torch.ones(2, 256, 256, dtype=torch.bool)
    known[1] = False
    x = prior.sample(2, torch.Generator().manual_seed(1))
    problem = Problem.simulate(x, PixelMask.from_mask(known, x), 0.05, noise)
    now = Level(1.0, 50.0, 50.0)
    step = Step(3, x + 50 * noise.normal("test", 0, x), now, now, problem, prior, noise)
    information = Lanczos(krylov=2, derivative=derivative)(step)
    assert bool(information.gradient.isfinite().all())
    assert float(information.gradient[1].abs().max()) == 0
    assert float(information.value[1]) == 0


def test_no_gradient_is_no_step_however_long(dense):
    prior = GaussianMixture(torch.zeros(1, *SHAPE), 0.3)
    step = make_step(prior, Dense(torch.zeros_like(dense.matrix), SHAPE), 300)
    proposal = DDPM().transition(step, lambda s: s.x0.detach())
    moved = CMI(scale=1e6, step_size="noise", max_step=math.inf).guide_transition(step, proposal)
    assert torch.equal(moved.mean, proposal.mean)


@pytest.mark.parametrize("base", [DPS(), PiGDM(), MCG(), DSG(), MomentMatching()], ids=str)
def test_on_a_gaussian_prior_cmi_and_a_base_are_the_base(dense, base):
    prior = GaussianPrior(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(SHAPE), 0.3)
    step = make_step(prior, dense)
    pushing = CMI(scale=1.0, max_step=math.inf, interval=1, min_signal=0.0, max_signal=1.0)
    alone, both = (
        Sampler(prior, DDPM(), g, 10).run(step.problem, step.noise, step.x.detach())
        for g in ([base], [pushing, base])
    )
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [30, 300, 600])
def test_chain_rule_what_x_t_tells_and_what_it_leaves_to_be_told_add_up(dense, index):
    """I(x₀; y) = I(x_t; y) + I(x₀; y | x_t), the first two from joint covariances."""
    prior = power_law_prior(list(SHAPE)).double()
    step = make_step(prior, dense, index)
    step.noise = AllSigns(step.noise)
    given = Lanczos(probes=4, krylov=3)(step).value
    C, A, eye = prior.covariance(), dense.matrix, torch.eye(6, dtype=torch.float64)
    alpha, sigma = step.t.alpha, step.t.sigma

    def information(u: Tensor, v: Tensor, across: Tensor) -> float:
        joint = torch.cat([torch.cat([u, across], 1), torch.cat([across.T, v], 1)])
        return float(torch.logdet(u) + torch.logdet(v) - torch.logdet(joint)) / 2

    y = A @ C @ A.T + 0.1**2 * eye[:3, :3]
    x_t = alpha**2 * C + sigma**2 * eye
    total, told = information(C, y, C @ A.T), information(x_t, y, alpha * C @ A.T)
    assert told > 1e-3
    torch.testing.assert_close(given, torch.full_like(given, total - told), rtol=1e-8, atol=0)


def test_value_vanishes_without_measurement_and_falls_with_noise(mixture, dense):
    nothing = Dense(torch.zeros_like(dense.matrix), SHAPE)
    assert float(Lanczos()(make_step(mixture, nothing)).value.abs().max()) < 1e-12
    values = []
    for sigma in (0.03, 0.1, 0.3, 1.0):
        step = make_step(mixture, dense, 300, sigma=sigma)
        step.noise = AllSigns(step.noise)
        values.append(Lanczos(probes=4, krylov=3)(step).value)
    assert all(bool((a > b).all()) for a, b in pairwise(values))


class Indefinite(GaussianMixture):
    """A "network" whose Jacobian is neither symmetric nor positive."""

    def forward(self, x: Tensor, level):
        x0 = super().forward(x, level).x0
        twist = torch.tanh(3 * x.flip(-1)) - 2 * torch.sin(2 * x)
        return super().forward(x, level)._replace(x0=x0 + twist)


def test_indefinite_jacobian_is_harmless(mixture, dense):
    prior = Indefinite(mixture.means, mixture.variances)
    for index in (100, 600, 950):
        step = make_step(prior, dense, index, sigma=0.05)
        information = Lanczos(krylov=3)(step)
        assert bool(torch.isfinite(information.gradient).all())
        J = [jacobian(step, prior, row).detach() for row in range(4)]
        for row, j in enumerate(J):
            S = dense.matrix @ j @ dense.matrix.T * step.covariance_factor / 0.05**2
            eigenvalues = torch.linalg.eigvalsh(0.5 * (S + S.T)) + 1
            # ½ Σ_i log max(λ_i, 1) bounds any probe's value by the largest eigenvalue's share
            top = 0.5 * 3 * eigenvalues.max().clamp_min(1).log()
            assert -1e-12 <= float(information.value[row]) <= float(top) + 1e-9


def test_spectral_form_of_an_indefinite_operator(mixture, dense):
    prior = Indefinite(mixture.means, mixture.variances)
    step = make_step(prior, dense, 600, sigma=0.05)
    step.noise = AllSigns(step.noise)
    value = Lanczos(probes=4, krylov=3)(step).value
    for row in range(4):
        S = dense.matrix @ jacobian(step, prior, row).detach() @ dense.matrix.T
        S = step.covariance_factor * S / 0.05**2 + torch.eye(3, dtype=S.dtype)
        exact = 0.5 * torch.linalg.eigvalsh(0.5 * (S + S.T)).clamp_min(1).log().sum()
        assert float(value[row]) == pytest.approx(float(exact), rel=1e-9)


def test_step_obeys_its_schedule_and_limit(mixture, dense):
    step = make_step(mixture, dense, 300)
    proposal = DDPM().transition(step, lambda s: s.x0.detach())
    estimator = Lanczos(krylov=3)
    gradient = estimator(step).gradient
    free = CMI(scale=2.0, max_step=math.inf, estimator=estimator).guide_transition(step, proposal)
    torch.testing.assert_close(
        free.mean - proposal.mean, 2.0 * step.coefficients.beta * gradient, rtol=1e-9, atol=1e-12
    )
    noise_length = math.sqrt(step.coefficients.variance * 6)
    limited = CMI(scale=1e6, max_step=0.01).guide_transition(step, proposal)
    lengths = norm(limited.mean - proposal.mean)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01 * noise_length))
    fixed = CMI(scale=0.003, step_size="noise").guide_transition(step, proposal)
    lengths = norm(fixed.mean - proposal.mean)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.003 * noise_length))
    assert set(step.log) >= {"cmi/value", "cmi/gradient", "cmi/residual"}
    descent = CMI(scale=-0.003, step_size="noise").guide_transition(step, proposal)
    torch.testing.assert_close(proposal.mean - descent.mean, fixed.mean - proposal.mean)


@pytest.mark.parametrize(
    "quiet",
    [CMI(min_signal=0.9, max_signal=1.0), CMI(interval=7)],
    ids=["outside the range", "off the interval"],
)
def test_step_is_left_alone(mixture, dense, quiet):
    step = make_step(mixture, dense, 300)
    proposal = DDPM().transition(step, lambda s: s.x0.detach())
    assert quiet.guide_transition(step, proposal) is proposal
    assert step.cost.vjps == 0


BASES = [DPS(), PiGDM(), MCG(), DSG(), DSG(interval=3), MomentMatching(krylov=2)]


@pytest.mark.parametrize(("base", "walks"), [*((b, 1) for b in BASES), (DPS(), 3)], ids=str)
@pytest.mark.parametrize(
    "cmi",
    [CMI(), CMI(budget=0.6), CMI(estimator=TraceLimit(derivative="difference"))],
    ids=["default", "budget 0.6", "trace"],
)
def test_budget_holds_over_the_whole_run(dense, base, walks, cmi):
    prior = GaussianPrior(torch.zeros(SHAPE, dtype=torch.float64), 0.3)
    step, spent = make_step(prior, dense), {}
    for guidances in ([base], [base, cmi]):
        sampler = Sampler(prior, Resampled(DDPM(), 5, walks), guidances, 40)
        *_, record = sampler.iterate(step.problem, step.noise, step.x.detach())
        spent[len(guidances)] = record.forwards + record.vjps
    extra, allowed = spent[2] - spent[1], (cmi.budget or 0.3) * spent[1]
    assert abs(extra - allowed) <= walks * cmi.estimator.passes()  # a step more or less


def test_budget_chooses_steps_evenly_by_schedule_and_cost_alone(mixture):
    sampler = Sampler(mixture, DDPM(), [CMI(), DPS()], 100)
    acting = sorted(vars(sampler.guidances[0])["_steps"][True])
    assert len(acting) == 20  # 0.3 · 200 passes, three each
    allowed = [i for i, t, s in sampler.schedule.pairs() if CMI().allows(t, s)]
    gaps = [b - a for a, b in pairwise([min(allowed), *acting, max(allowed)])]
    assert max(gaps) - min(gaps[1:-1]) <= 2
    curved = vars(sampler.guidances[0])["_steps"][False]
    assert len(curved) == 10  # the change of A' takes three more
    least = Sampler(mixture, DDPM(), [CMI(budget=1e-6), DPS()], 400).guidances[0]
    assert least.plan() == "at 1 of 400 steps, for 0.004 of the 800 passes without it"
    everywhere = Sampler(mixture, DDPM(), [CMI(budget=math.inf), DPS()], 100).guidances[0]
    assert sorted(vars(everywhere)["_steps"][True]) == sorted(allowed)


def test_estimator_of_unknown_cost_needs_an_interval(mixture):
    class Mine(Lanczos):
        products = None

    with pytest.raises(InputError, match=r"Mine\.passes.*CMI\.interval"):
        Sampler(mixture, DDPM(), [CMI(estimator=Mine())], 10)
    Sampler(mixture, DDPM(), [CMI(estimator=Mine(), interval=2)], 10)


def test_a_graph_is_freed_once_nobody_needs_it_and_made_again_for_who_does(mixture, dense):
    """Before DPS, CMI leaves the graph alone; after it, another one takes its place."""
    step, passes = make_step(mixture, dense), {}
    for order in ("before", "after"):
        guidances = [CMI(interval=1), DPS()] if order == "before" else [DPS(), CMI(interval=1)]
        sampler = Sampler(mixture, DDPM(), guidances, 10)
        *_, record = sampler.iterate(step.problem, step.noise, step.x.detach())
        passes[order] = (record.forwards, record.vjps)
    assert passes["before"] == passes["after"]
    v, expected = torch.ones_like(step.x), step.vjp(torch.ones_like(step.x))
    forwards = step.cost.forwards
    step.release()
    assert step.x0.grad_fn is None
    torch.testing.assert_close(step.vjp(v), expected, rtol=0, atol=0)
    assert step.cost.forwards == forwards + 1


TABLES = CMI(
    0.3, "noise", 1.0, interval=6, estimator=Lanczos(krylov=6, derivative="difference")
)  # as configs/table.yaml adds it
FROZEN = {  # of a seeded run: sum, sum of squares and one pixel, before CMI had a budget
    "DPS": ([DPS(0.3)], 15.91489273411695, 10.729216196925824, 0.3786769024874244),
    "PiGDM": ([PiGDM()], 10.230183121593676, 9.101674011356714, 0.39158943729313167),
    "MCG": ([MCG(0.3)], 0.6548048827266227, 11.290409215867466, 0.3746265537779593),
    "DSG": ([DSG()], 0.8211094456076826, 12.300004501133717, 0.3481013007010719),
    "tables": ([DPS(0.3), TABLES], 15.842559261635738, 9.999050301595055, 0.3824505949049422),
}


@pytest.mark.parametrize("name", list(FROZEN))
def test_seeded_runs_are_what_they_were(name):
    guidances, *expected = FROZEN[name]
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
    prior = GaussianMixture(torch.stack([x[0], x[1], -x[0]]), 0.1)
    noise = SampleNoise(0, ["a", "b"])
    problem = Problem.simulate(x, BoxMask(2, margin=1), 0.05, noise)
    z = Sampler(prior, DDPM(), guidances, 12).run(problem, noise, x)
    found = [float(z.sum()), float(z.square().sum()), float(z[1, 0, 1, 2])]
    assert found == pytest.approx(expected, rel=1e-9)
