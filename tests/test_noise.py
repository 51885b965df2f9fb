"""A sample's noise is its own."""

from __future__ import annotations

import torch

from cmi_lightning.noise import SampleNoise

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
