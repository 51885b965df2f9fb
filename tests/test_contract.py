"""What every combination of guidance, operator, solver and precision owes its user."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

from cmi_lightning.denoisers import Autocast
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, MomentMatching, PiGDM
from cmi_lightning.information import Estimator, Lanczos, TraceLimit
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    BoxMask,
    Downsample,
    GaussianBlur,
    Identity,
    LinearOperator,
    MotionBlur,
    PixelMask,
    RandomMask,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM, DDPM, Heun
from cmi_lightning.step import Step

BASES = {
    "none": [],
    "DPS": [DPS()],
    "PiGDM": [PiGDM()],
    "MCG": [MCG()],
    "DSG": [DSG()],
    "MomentMatching": [MomentMatching(krylov=2)],
}


class Ragged(LinearOperator):
    """A mask that keeps a different number of pixels in every image."""

    def bind(self, image_shape, noise, like):
        known = [
            torch.rand(image_shape[1:], generator=noise.generator(row, "ragged")) > 0.5
            for row in range(len(noise.ids))
        ]
        return PixelMask.from_mask(
            torch.stack(known), like.new_empty(()).expand(len(known), *image_shape)
        )

    def __repr__(self) -> str:
        return "Ragged()"


OPERATORS = [
    Identity(),
    Ragged(),
    RandomMask(0.9),
    BoxMask(4, 1),
    GaussianBlur(9, 1.5),
    MotionBlur(5, 0.5),
    Downsample(4),
]
SOLVERS = [DDPM(), DDIM()]  # and DDIM(1.0) for DSG, which needs noise
CASES = [
    pytest.param(base, cmi, operator, solver, id=f"{base}{'+CMI' * cmi}-{operator}-{solver}")
    for base, cmi, operator in itertools.product(BASES, (False, True), OPERATORS)
    for solver in (SOLVERS if base != "DSG" else [DDPM(), DDIM(1.0)])
]
# Each guidance meets each operator, half of them with CMI; solvers alternate.
THRIFTY = [CASES[28 * b + 14 * ((b + o) % 2) + 2 * o + (b + o // 2) % 2]
           for b, o in itertools.product(range(len(BASES)), range(len(OPERATORS)))]  # fmt: skip
FEW = "ddim2"  # from t = 500: at t = 999 the network's rounding is magnified by σ/α = 157
NAMES = ("base", "cmi", "operator", "solver")


def guidances_of(base: str, cmi: bool) -> list:
    always = CMI(interval=1, min_signal=0.0, max_signal=1.0, estimator=Lanczos(krylov=2))
    return [*BASES[base], *[always] * cmi]


def restore(sampler: Sampler, operator, x: torch.Tensor, ids: list[str]):
    noise = SampleNoise(0, ids)
    problem = Problem.simulate(x, operator, 0.05, noise)
    *_, record = sampler.iterate(problem, noise, x)
    return record


@pytest.fixture(scope="module")
def garments(shipped_images) -> torch.Tensor:
    """Centres of four garments: the network is convolutional, and this is faster."""
    return shipped_images[:4, :, 12:20, 12:20]


@pytest.mark.parametrize(NAMES, THRIFTY)
def test_on_the_shipped_prior(prior, garments, base, cmi, operator, solver):
    sampler = Sampler(prior, solver, guidances_of(base, cmi), FEW)
    ids = ["a", "b", "c", "d"]
    record = restore(sampler, operator, garments, ids)
    assert bool(torch.isfinite(record.x).all())
    assert record.forwards == 2
    single = restore(sampler, operator, garments[3:], ids[3:]).x
    # Moment matching multiplies the network's rounding by σ²/α = 24² and by its solve.
    tolerance = 2e-3 if base == "MomentMatching" else 1e-4
    torch.testing.assert_close(record.x[3:], single, rtol=0, atol=tolerance)
    low = Sampler(Autocast(prior, torch.bfloat16), solver, guidances_of(base, cmi), FEW)
    record = restore(low, operator, garments, ids)
    assert bool(torch.isfinite(record.x).all())
    assert record.x.dtype == torch.float32


@pytest.mark.parametrize(NAMES, CASES)
def test_on_an_exact_prior_a_batch_is_its_samples(base, cmi, operator, solver):
    g = torch.Generator().manual_seed(0)
    prior = GaussianMixture(torch.randn(3, 1, 12, 8, generator=g), 0.1)
    x = prior.sample(4, g)
    sampler = Sampler(prior, solver, guidances_of(base, cmi), 6)
    ids = ["a", "b", "c", "d"]
    record = restore(sampler, operator, x, ids)
    assert bool(torch.isfinite(record.x).all())
    assert record.forwards == 6
    for i in (0, 3):
        alone = restore(sampler, operator, x[i : i + 1], [ids[i]])
        if isinstance(operator, Ragged):  # padding lengthens its sums, which then round differently
            torch.testing.assert_close(record.x[i], alone.x[0], rtol=1e-3, atol=1e-4)
            continue
        assert torch.equal(record.x[i], alone.x[0])
        assert {k: float(v[i]) for k, v in record.log.items()} == {
            k: float(v[0]) for k, v in alone.log.items()
        }


def test_moment_matching_on_the_shipped_prior_differs_by_rounding_only(prior, garments):
    wide, x = copy.deepcopy(prior).double(), garments.double()
    sampler = Sampler(wide, DDIM(), guidances_of("MomentMatching", False), FEW)
    together = restore(sampler, BoxMask(4, 1), x, list("abcd")).x
    alone = [restore(sampler, BoxMask(4, 1), x[i : i + 1], ["abcd"[i]]).x for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("index", [200, 500])
def test_low_precision_keeps_the_direction_of_cmi(prior, shipped_images, index):
    x0, noise = shipped_images[:4, :, 8:24, 8:24], SampleNoise(0, list("abcd"))
    t, s = prior.schedule[index], prior.schedule[index - 1]
    x = t.alpha * x0 + t.sigma * noise.normal("test", 0, x0)
    problem = Problem.simulate(x0, Downsample(4), 0.05, noise)

    def cosines(estimator: Estimator) -> torch.Tensor:
        full, low = (
            estimator(Step(index, x, t, s, problem, d, noise)).gradient.flatten(1)
            for d in (prior, Autocast(prior, torch.bfloat16))
        )
        return torch.cosine_similarity(full, low)

    assert float(cosines(TraceLimit()).min()) > 0.95
    # A sample may have a Ritz value at the noise level, where the spectral function jumps.
    assert float(cosines(Lanczos()).median()) > 0.95


@pytest.mark.parametrize("base", list(BASES))
def test_cmi_of_scale_zero_is_the_base_bit_for_bit_and_free(prior, garments, base):
    plain = restore(Sampler(prior, DDPM(), BASES[base], 3), BoxMask(4, 1), garments, list("abcd"))
    zero = Sampler(prior, DDPM(), [CMI(scale=0.0), *BASES[base]], 3)
    record = restore(zero, BoxMask(4, 1), garments, list("abcd"))
    assert torch.equal(plain.x, record.x)
    assert (plain.forwards, plain.vjps) == (record.forwards, record.vjps)


def test_unguided_sampling_builds_no_graph(prior, garments, monkeypatch):
    seen, forward = [], type(prior).forward

    def spy(self, x, level):
        seen.append((x.requires_grad, torch.is_grad_enabled()))
        return forward(self, x, level)

    monkeypatch.setattr(type(prior), "forward", spy)
    record = restore(Sampler(prior, DDPM(), [], 3), Identity(), garments, list("abcd"))
    assert seen == [(False, False)] * 3
    assert record.vjps == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_mode_is_the_callers_own(prior, garments, enabled):
    sampler = Sampler(prior, DDPM(), [CMI(interval=1, estimator=Lanczos(krylov=2)), DPS()], 3)
    noise = SampleNoise(0, list("abcd"))
    problem = Problem.simulate(garments, Identity(), 0.05, noise)
    with torch.set_grad_enabled(enabled):
        for record in sampler.iterate(problem, noise, garments):
            assert torch.is_grad_enabled() is enabled
            assert not record.x.requires_grad
            assert not record.x0.requires_grad
            assert not any(v.requires_grad for v in record.log.values())
        assert torch.is_grad_enabled() is enabled


def test_no_graph_outlives_its_step(prior, garments, monkeypatch):
    sampler = Sampler(prior, DDPM(), [CMI(interval=1, estimator=Lanczos(krylov=2)), DPS()], 4)
    noise = SampleNoise(0, list("abcd"))
    problem = Problem.simulate(garments, Identity(), 0.05, noise)
    alive: list[weakref.ref] = []
    forward = type(prior).forward

    def watch(self, x, level):
        assert not any(ref() is not None for ref in alive), "an earlier graph is alive"
        prediction = forward(self, x, level)
        alive.append(weakref.ref(prediction.x0))
        return prediction

    monkeypatch.setattr(type(prior), "forward", watch)
    gc.disable()  # graphs must go by reference counting alone
    try:
        for _ in sampler.iterate(problem, noise, garments):
            pass
    finally:
        gc.enable()
    assert len(alive) == 4


def test_heun_runs_every_guidance_but_dsg(prior, garments):
    for base in ("none", "DPS", "PiGDM", "MCG"):
        sampler = Sampler(prior, Heun(), guidances_of(base, True), 3)
        record = restore(sampler, BoxMask(4, 1), garments, list("abcd"))
        assert bool(torch.isfinite(record.x).all())
        assert record.forwards == 2 * 3 - 1


def test_log_tells_what_happened(prior, garments):
    noise = SampleNoise(0, list("abcd"))
    problem = Problem.simulate(garments, BoxMask(4, 1), 0.05, noise)
    sampler = Sampler(prior, DDPM(), [CMI(interval=1, estimator=Lanczos(krylov=2)), MCG()], 4)
    records = list(sampler.iterate(problem, noise, garments))
    expected = {"residual", "step/MCG", "sample/MCG"}
    assert all(set(r.log) >= expected for r in records)
    acting = {"step/CMI", "cmi/value", "cmi/gradient", "cmi/residual"}
    assert any(set(r.log) >= acting for r in records)
    first = records[0]
    residual = problem.y - problem.operator(first.x0)
    torch.testing.assert_close(first.log["residual"], residual.flatten(1).norm(dim=1))
