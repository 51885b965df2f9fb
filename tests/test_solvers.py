"""The contract of solvers: levels, start, memory, resampling; each solver against closed forms."""

import math
from dataclasses import dataclass

import pytest
import torch
from conftest import SHAPE

from cmi_lightning.errors import InputError
from cmi_lightning.exact import as_matrix
from cmi_lightning.guidance import DDNM, DPS
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    Dense,
    Downsample,
    GaussianBlur,
    Identity,
    MotionBlur,
    RandomMask,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM, DDPM, Renoise, Resampled

NOISE = SampleNoise(0, ["a", "b"])
LIKE = torch.zeros(2, *SHAPE, dtype=torch.float64)


@pytest.fixture
def problem(dense) -> Problem:
    return Problem(torch.ones(2, 3, dtype=torch.float64), dense, 0.1)


def test_a_walk_without_repeats_is_the_solver(mixture, problem):
    runs = [
        Sampler(mixture, solver, [DPS()], 6).run(problem, NOISE, LIKE)
        for solver in (DDPM(), Resampled(DDPM(), jump=2, repeats=1))
    ]
    assert torch.equal(*runs)


def test_a_walk_goes_up_by_the_forward_chain(mixture, problem):
    sampler = Sampler(mixture, Resampled(DDIM(), jump=2, repeats=3), [], 5)
    seen = []
    inner = sampler.advance
    sampler.advance = lambda step: seen.append((step, x := inner(step))) or x
    records = list(sampler.iterate(problem, NOISE, LIKE))
    assert [s.index for s, _ in seen] == [4, 3] * 3 + [2, 1] * 3 + [0] * 3
    assert [s.visit for s, _ in seen] == [0, 0, 1, 1, 2, 2] * 2 + [0, 1, 2]
    assert [r.index for r in records] == [4, 3, 2, 1, 0]
    assert records[-1].forwards == 15
    assert [s.previous is None for s, _ in seen[:7]] == [True, False] * 3 + [False]
    (_, x), (again, _) = seen[1], seen[2]  # from level 2 up to level 4
    s, t = sampler.schedule[2], sampler.schedule[4]
    ratio = t.alpha / s.alpha
    z = NOISE.normal("up~1", 4, x)
    expected = ratio * x + math.sqrt(t.sigma**2 - ratio**2 * s.sigma**2) * z
    torch.testing.assert_close(again.x.detach(), expected)


def test_every_visit_draws_its_own_noise(mixture, problem):
    sampler = Sampler(mixture, Resampled(DDPM(), jump=1, repeats=2), [], 3)
    seen, inner = [], sampler.advance
    sampler.advance = lambda step: seen.append(step.normal("solver")) or inner(step)
    list(sampler.iterate(problem, NOISE, LIKE))
    assert len({tuple(z.flatten().tolist()) for z in seen}) == 6
    assert torch.equal(seen[0], NOISE.normal("solver", 2, LIKE))  # the first: as ever


def test_renoise_mixes_old_and_new_noise(mixture, dense):
    from conftest import make_step

    step = make_step(mixture, dense)
    moved = step.x0.detach() + 0.1
    t, s, z = step.t, step.s, step.normal("solver")
    for network, base in ((True, step.x0.detach()), (False, moved)):
        got = Renoise(0.3, network).transition(step, lambda _: moved).sample()
        epsilon = (step.x.detach() - t.alpha * base) / t.sigma
        expected = s.alpha * moved + s.sigma * (math.sqrt(0.7) * epsilon + math.sqrt(0.3) * z)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        Renoise(0.0).transition(step, lambda _: moved).sample(),
        DDIM(0.0).transition(step, lambda _: moved).sample(),
    )


@dataclass(frozen=True)
class Blind(Renoise):
    """A solver that asks for no guided x̂₀."""

    hooks = ("guide_transition", "guide_sample")


def test_guidances_that_a_solver_would_ignore_are_refused(mixture):
    with pytest.raises(InputError, match=r"DDNM moves x̂₀, and Blind takes no such move"):
        Sampler(mixture, Blind(), [DDNM()])
    with pytest.raises(InputError, match=r"DDNM moves x̂₀, and Resampled takes"):
        Sampler(mixture, Resampled(Blind()), [DDNM()])
    Sampler(mixture, Blind(), [DPS(), DDNM.__mro__[1]()])


@pytest.mark.parametrize(
    "operator",
    [
        Identity(),
        RandomMask(0.6),
        GaussianBlur(5, 1.0),
        Downsample(2),
        MotionBlur(3, padding="circular"),
        Dense(NOISE.normal("matrix", 0, torch.zeros(2, 3, 36))[0].double()),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_spectral_functions_by_dense_singular_vectors(operator):
    """V f(s) Vᵀ x, f(0) on what A does not see; f of a sample's own."""
    noise, like = SampleNoise(0, ["a", "b"]), torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    bound = operator.bind((1, 6, 6), noise, like)
    x = noise.normal("test", 0, like)
    rate = torch.tensor([0.5, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    found = bound.spectral(x, lambda s: torch.exp(-rate * s) + (s == 0))
    y = bound(x)
    for row in range(2):
        matrix = as_matrix(bound, y, row)
        _, s, vh = torch.linalg.svd(matrix)
        s = torch.cat([s, s.new_zeros(36 - len(s))])
        f = torch.exp(-rate[row].flatten() * s) + (s < 1e-7)
        expected = vh.mT @ (f * (vh @ x[row].flatten()))
        torch.testing.assert_close(found[row].flatten(), expected, rtol=1e-6, atol=1e-6)


def test_operators_without_singular_values_refuse():
    noise, like = SampleNoise(0, ["a"]), torch.zeros(1, 1, 6, 6)
    bound = MotionBlur(3).bind((1, 6, 6), noise, like)
    with pytest.raises(InputError, match=r"no singular values in closed form.*solver/ddnm"):
        bound.spectral(like, torch.exp)
