"""A sample's noise is its own."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG
from cmi_lightning.noise import NoiseAhead, SampleNoise
from cmi_lightning.operators import BoxMask
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DAPS, DDPM, FPS, Resampled

LIKE = torch.zeros(3, 2, 5)


def test_noise_does_not_depend_on_the_batch():
    together = SampleNoise(1, ["a", "b", "c"]).normal("solver", 7, LIKE)
    apart = torch.cat([SampleNoise(1, [i]).normal("solver", 7, LIKE[:1]) for i in "abc"])
    shuffled = SampleNoise(1, ["c", "a", "b"]).normal("solver", 7, LIKE)
    assert torch.equal(together, apart)
    assert torch.equal(together, shuffled[[1, 2, 0]])


def test_every_part_of_the_key_counts():
    draws = [
        SampleNoise(seed, [name]).normal(stream, step, LIKE[:1])
        for seed, name, stream, step in [
            (0, "a", "s", 0),
            (1, "a", "s", 0),
            (0, "b", "s", 0),
            (0, "a", "r", 0),
            (0, "a", "s", 1),
            (0, "a", "s1", 0),
        ]
    ]
    for i, first in enumerate(draws):
        assert not any(torch.equal(first, second) for second in draws[i + 1 :])


def test_precision_does_not_change_the_numbers():
    noise = SampleNoise(0, ["a", "b", "c"])
    single, double = noise.normal("s", 0, LIKE), noise.normal("s", 0, LIKE.double())
    assert torch.equal(single.double(), double)


def test_moments():
    noise = SampleNoise(0, [str(i) for i in range(100)])
    like = torch.zeros(100, 400)
    z, signs = noise.normal("s", 0, like), noise.signs("s", 0, like)
    assert abs(float(z.mean())) < 4 / 200
    assert abs(float(z.var()) - 1) < 4 * 2**0.5 / 200
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / 200


def test_default_dtype_does_not_change_the_numbers():
    noise = SampleNoise(0, ["a", "b", "c"])
    before = noise.normal("s", 0, LIKE.double())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(noise.normal("s", 0, LIKE.double()), before)
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def ahead(noise: SampleNoise, device: torch.device):
    """As on a device other than the CPU."""
    with ThreadPoolExecutor(1) as thread:
        yield NoiseAhead(noise.seed, noise.ids, thread)


@pytest.mark.parametrize(
    ("solver", "guidances"),
    [
        (DDPM(), [DPS()]),
        (DDPM(), [CMI(interval=2), DPS()]),
        (DDPM(), [MCG(), DSG()]),
        (DAPS(), []),
        (FPS(particles=2), []),
        (Resampled(DDPM(), repeats=2, jump=3), [DPS()]),
    ],
    ids=["DPS", "CMI+DPS", "MCG+DSG", "DAPS", "FPS", "Resampled"],
)
def test_numbers_drawn_ahead_are_the_same(monkeypatch, solver, guidances):
    x, noise = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    problem = Problem.simulate(x, BoxMask(4, 1), 0.05, noise)
    sampler = Sampler(GaussianPrior(x[0]), solver, guidances, num_steps=6)
    plain = sampler.run(problem, noise, x)
    threads, draw = [], SampleNoise.rows

    def told(self, *args):
        threads.append(threading.current_thread())
        return draw(self, *args)

    monkeypatch.setattr(SampleNoise, "ahead", ahead)
    monkeypatch.setattr(SampleNoise, "rows", told)
    assert torch.equal(sampler.run(problem, noise, x), plain)
    others = {thread for thread in threads if thread is not threading.main_thread()}
    assert len(others) == 1
    assert not any(thread.is_alive() for thread in others)
    if guidances == [DPS()] and isinstance(solver, DDPM):  # all but x_N and the first step's
        assert threads.count(threading.main_thread()) == 2


def test_a_chain_that_is_left_ends_its_thread(monkeypatch):
    monkeypatch.setattr(SampleNoise, "ahead", ahead)
    before = set(threading.enumerate())
    x, noise = torch.zeros(1, 1, 8, 8), SampleNoise(0, ["a"])
    problem = Problem.simulate(x, BoxMask(4, 1), 0.05, noise)
    records = Sampler(GaussianPrior(x[0]), DDPM(), [DPS()], 5).iterate(problem, noise, x)
    next(records)
    (own,) = set(threading.enumerate()) - before
    records.close()
    assert not own.is_alive()


def test_a_chain_on_the_cpu_draws_at_once():
    noise = SampleNoise(0, ["a"])
    with noise.ahead(torch.device("cpu")) as same:
        assert same is noise
    with noise.ahead(torch.device("meta")) as other:
        assert isinstance(other, NoiseAhead)
        assert not other.pin
        assert other.normal("s", 3, torch.empty(1, 2, device="meta")).device.type == "meta"
