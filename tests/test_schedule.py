"""Schedules against published values and Bayes' rule."""

import math

import pytest
import torch

from cmi_lightning import Sampler
from cmi_lightning.errors import InputError, warn_once
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import CLEAN, Level, Schedule, reverse_coefficients
from cmi_lightning.solvers import DDIM


def abar(schedule: Schedule, i: int) -> float:
    return schedule[i].alpha ** 2


def test_linear_chain_has_the_published_values():
    schedule = Schedule.linear()
    published = {0: 0.9999, 99: 0.897018, 249: 0.524085, 499: 0.0785872, 749: 3.35055e-3}
    for i, value in published.items():
        assert abar(schedule, i) == pytest.approx(value, rel=2e-6)
    assert abar(schedule, 999) == pytest.approx(4.03583e-5, rel=2e-6)
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in schedule)


@pytest.mark.parametrize(
    ("spec", "first", "last", "count"),
    [
        (100, [0, 10, 20], [989, 999], 100),
        (50, [0, 20, 41, 61, 82], [999], 50),
        (20, [0, 53, 105, 158], [999], 20),
        ("ddim50", [0, 20, 40], [980], 50),
        ("10,20", [0, 55], [999], 30),
        (1, [999], [999], 1),
        ("ddim1", [0], [0], 1),
        ("1,1", [0], [999], 2),
        ("10,1", [0, 55], [499, 999], 11),
        ("ddim2", [0], [500], 2),
        (1000, [0, 1, 2], [999], 1000),
    ],
)
def test_respacing_follows_guided_diffusion(spec, first, last, count):
    times = list(Schedule.linear().respace(spec).times)
    assert times[: len(first)] == first
    assert times[-len(last) :] == last
    assert len(times) == count


def test_respaced_levels_keep_their_noise():
    full = Schedule.linear()
    for level in full.respace(17):
        assert level == full[int(level.time)]


@pytest.mark.parametrize("spec", [0, 1001, "ddim7x", "600,600", "ddim999", "-3"])
def test_impossible_respacing_is_refused(spec):
    with pytest.raises(InputError, match="num_steps"):
        Schedule.linear().respace(spec)


def test_posterior_equals_ddpm_coefficients():
    schedule = Schedule.linear()
    for t in (1, 10, 500, 999):
        a_t, a_s = abar(schedule, t), abar(schedule, t - 1)
        beta = 1 - a_t / a_s
        chain = reverse_coefficients(schedule[t], schedule[t - 1])
        assert chain.beta == pytest.approx(beta, rel=1e-10)
        assert chain.variance == pytest.approx(beta * (1 - a_s) / (1 - a_t), rel=1e-10)
        assert chain.from_x0 == pytest.approx(beta * math.sqrt(a_s) / (1 - a_t), rel=1e-10)
        ratio = math.sqrt(1 - beta)
        assert chain.from_x == pytest.approx((1 - a_s) * ratio / (1 - a_t), rel=1e-10)


def test_last_step_returns_the_clean_image():
    chain = reverse_coefficients(Schedule.linear()[0], CLEAN)
    assert chain.from_x0 == pytest.approx(1)
    assert (chain.from_x, chain.variance) == (0, 0)


def test_posterior_holds_for_any_gaussian_chain():
    # x_t = (α_t/α_s) x_s + √β ε; condition the joint Gaussian of (x_s, x_t) given x₀ directly.
    t, s = Level(0.8, 1.7, 0), Level(0.9, 0.6, 0)
    ratio = t.alpha / s.alpha
    covariance, variance = ratio * s.sigma**2, t.sigma**2
    gain = covariance / variance
    chain = reverse_coefficients(t, s)
    assert chain.from_x == pytest.approx(gain)
    assert chain.from_x0 == pytest.approx(s.alpha - gain * t.alpha)
    assert chain.variance == pytest.approx(s.sigma**2 - gain * covariance)


def test_cosine_and_edm_end_where_their_papers_say():
    cosine = Schedule.cosine()
    offset = 0.008
    start = math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    middle = math.cos((0.5 + offset) / (1 + offset) * math.pi / 2) ** 2 / start
    assert abar(cosine, 499) == pytest.approx(middle, rel=1e-9)
    assert abar(cosine, 999) < 1e-5
    edm = Schedule.edm(18)
    assert (edm[0].sigma, edm[17].sigma) == (pytest.approx(0.002), pytest.approx(80))
    assert edm[9].sigma == pytest.approx(
        (0.002 ** (1 / 7) + 9 / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    )
    assert set(edm.alphas) == {1.0}


def test_levels_never_fall():
    with pytest.raises(ValueError, match="increase"):
        Schedule((1.0, 1.0), (0.2, 0.1), (0, 1))
    with pytest.raises(ValueError, match="one length"):
        Schedule((1.0,), (0.2, 0.1), (0, 1))
    for sigmas in ((0.0, 0.1), (0.1, math.nan)):
        with pytest.raises(InputError, match="increase"):
            Schedule((1.0, 1.0), sigmas, (0, 1))


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.linear().respace(1),
        Schedule.linear(1),
        Schedule.cosine(1),
        Schedule.edm(1),
        Schedule.edm().respace(1),
        Schedule.vp(1),
        Schedule.vp().respace(1),
    ],
)
def test_one_level_is_the_noisiest(schedule):
    assert len(schedule) == 1
    assert (schedule[0].sigma > 0.9) or schedule == Schedule.from_betas([0.02])


def warnings_of(caplog, act) -> str:
    """The warnings of an action, as if this process had not had them before."""
    warn_once.cache_clear()
    caplog.clear()
    act()
    act()
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "cmi_lightning")


@pytest.mark.parametrize("make", [Schedule.from_betas, lambda b: Schedule.linear(2, b[0], b[-1])])
def test_a_last_level_without_signal_is_left_out_and_said(caplog, make):
    assert warnings_of(caplog, lambda: make([0.1, 1.0])).count("no signal") == 1
    assert make([0.1, 1.0]) == Schedule.from_betas([0.1])
    assert not warnings_of(caplog, lambda: Schedule.from_betas([0.1, 0.2]))
    with pytest.raises(InputError, match="without signal"):
        Schedule((0.9, 0.0), (0.1, 1.0), (0, 1))
    with pytest.raises(InputError, match="num_levels"):
        Schedule.linear(0)


@pytest.mark.parametrize(
    ("schedule", "num_steps", "warned"),
    [
        (Schedule.linear(), None, False),
        (Schedule.cosine(), 1, False),
        (Schedule.edm(), 4, False),
        (Schedule.vp(), 2, False),
        (Schedule.linear(), "ddim10", False),
        (Schedule.linear(), "ddim2", True),
        (Schedule.linear(), "ddim1", True),
        (Schedule.linear(100), None, True),
        (Schedule.edm(100, sigma_max=1.0), None, True),
    ],
)
def test_a_chain_that_does_not_end_in_noise_is_said(caplog, schedule, num_steps, warned):
    sampler = Sampler(GaussianPrior(torch.zeros(1), 1.0, schedule), DDIM(), num_steps=num_steps)
    like, noise = torch.zeros(2, 1), SampleNoise(0, ["a", "b"])
    problem = Problem(like, Identity(), 0.1)
    told = warnings_of(caplog, lambda: sampler.run(problem, noise, like))
    assert told.count("does not end in noise") == warned


def test_pairs_run_from_noise_to_clean():
    pairs = list(Schedule.linear().respace(3).pairs())
    assert [i for i, _, _ in pairs] == [2, 1, 0]
    assert [now.time for _, now, _ in pairs] == [999, 500, 0]
    assert pairs[-1][2] == CLEAN


RECTIFIED = [0.02 + 0.096 * k for k in range(11)]


@pytest.mark.parametrize(
    ("schedule", "total", "accuracy"),
    [
        (Schedule.linear().respace(20), lambda a, s: a**2 + s**2, 1e-12),
        (Schedule.edm(20), lambda a, s: a, 1e-12),
        (Schedule([1 - s for s in RECTIFIED], RECTIFIED, RECTIFIED), lambda a, s: a + s, 1e-12),
        (Schedule.linear().scale_noise(2.0), lambda a, s: a**2 + s**2 / 4, 1e-5),
    ],
)
def test_levels_between_levels(schedule, total, accuracy):
    for i in (0, 4, len(schedule) - 1):
        own = schedule[i]
        assert schedule.level(own.sigma / own.alpha) == pytest.approx(own, rel=1e-9)
    between = schedule.level(1.3)
    assert between.sigma / between.alpha == pytest.approx(1.3)
    assert total(between.alpha, between.sigma) == pytest.approx(1, abs=accuracy)
    if schedule.times[3] == schedule.sigmas[3]:
        assert between.time == pytest.approx(between.sigma)
    low, high = schedule.range
    for outside in (0.9 * low, 1.1 * high):
        with pytest.raises(InputError, match="The prior knows noise levels"):
            schedule.level(outside)


def test_a_chain_may_stay_at_a_level():
    levels = Schedule.edm().at([0.5, 0.5, 2.0])
    assert [level.sigma for level in levels] == pytest.approx([0.5, 0.5, 2.0])
    stay = reverse_coefficients(levels[1], levels[0])
    assert stay == (1.0, 0.0, 0.0, 0.0)
