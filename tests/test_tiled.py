"""Images larger than the network: windows, their weights, seams, derivatives, memory."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import graph_bytes, randn
from torch import Tensor, nn

from cmi_lightning import PosteriorSampler
from cmi_lightning.denoisers import (
    Autocast,
    Denoiser,
    NetworkDenoiser,
    Prediction,
    Tiled,
    UNet,
    shipped_prior,
)
from cmi_lightning.denoisers.tiled import _axis
from cmi_lightning.errors import InputError
from cmi_lightning.exact import DenseCovariance, GaussianPrior, StationaryCovariance
from cmi_lightning.guidance import DPS
from cmi_lightning.schedule import Schedule

LEVEL = Schedule.linear()[300]
SIZES = [(8, 8), (8, 11), (23, 8), (13, 29), (9, 40)]


class Local(Denoiser):
    """A nonlinear function of 3×3 neighbourhoods, with a variance; counts its windows."""

    schedule, learns_variance, value_range = Schedule.linear(), True, (-1.0, 1.0)

    def __init__(self, channels: int = 1, image_shape=(1, 8, 8)) -> None:
        super().__init__()
        kernel = torch.randn(channels, channels, 3, 3, generator=torch.manual_seed(0)) / 3
        self.register_buffer("kernel", kernel.double())
        self.image_shape, self.calls = image_shape, []

    def forward(self, x, level):
        self.calls.append(tuple(x.shape))
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
        return Prediction(torch.tanh(nn.functional.conv2d(padded, self.kernel)), x.sigmoid())


class Constant(Local):
    def forward(self, x, level):
        return Prediction(torch.full_like(x, 0.3), torch.full_like(x, 0.6))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 1, 4, 7])
def test_weights_are_a_partition_of_unity(size, overlap):
    prediction = Tiled(Constant(), overlap=overlap)(randn(2, 1, *size), LEVEL)
    for part, value in zip(prediction, (0.3, 0.6), strict=True):
        torch.testing.assert_close(part, torch.full_like(part, value), rtol=1e-14, atol=0)
    axis = _axis(size[1], min(size[1], 8), Tiled(Constant(), overlap=overlap).overlap)
    assert all(bool((weight > 0).all()) for _, weight in axis)
    starts = [start for start, _ in axis]
    assert (starts[0], starts[-1]) == (0, size[1] - 8)
    assert all(b - a <= 8 - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("tiles_at_once", [1, 3, 100])
def test_windows_in_one_call(tiles_at_once):
    local = Local()
    x = randn(2, 1, 20, 8)  # 4 windows an image
    ours = Tiled(local, overlap=4, tiles_at_once=tiles_at_once)(x, LEVEL)
    assert [len_ for len_, *_ in local.calls] == {1: [1] * 8, 3: [3, 3, 2], 100: [8]}[tiles_at_once]
    assert {call[1:] for call in local.calls} == {(1, 8, 8)}
    other = Tiled(Local(), overlap=4)(x, LEVEL)
    torch.testing.assert_close(ours.x0, other.x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_images_do_not_see_each_other(size):
    tiled = Tiled(Local(), overlap=3)
    x = randn(3, 1, *size)
    together = tiled(x, LEVEL)
    for i in range(3):
        alone = tiled(x[i : i + 1], LEVEL)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-12, atol=1e-12)


def dense(denoiser: Denoiser, tiled: Tiled, x: Tensor) -> Tensor:
    """The formula, a window after another, by indices alone."""
    out = torch.zeros_like(x)
    for top, down in _axis(x.shape[-2], 8, tiled.overlap):
        for left, across in _axis(x.shape[-1], 8, tiled.overlap):
            rows, columns = torch.arange(top, top + 8), torch.arange(left, left + 8)
            index = (..., rows[:, None], columns)
            weight = torch.zeros_like(x).index_put(
                (torch.tensor(0), torch.tensor(0), rows[:, None], columns), down[:, None] * across
            )
            window = torch.zeros_like(x)
            window[index] = denoiser(x[index], LEVEL).x0
            out = out + weight * window
    return out


@pytest.mark.parametrize("size", [(8, 8), (13, 8), (11, 15)])
def test_derivatives_are_those_of_the_formula(size):
    tiled = Tiled(Local(), overlap=3, tiles_at_once=2)
    x, u, p = (randn(1, 1, *size, seed=s) for s in (1, 2, 3))
    results = []
    for f in (lambda z: tiled(z, LEVEL).x0, lambda z: dense(Local(), tiled, z)):
        z = x.clone().requires_grad_()
        value = f(z)
        (first,) = torch.autograd.grad(value, z, u, create_graph=True)
        (second,) = torch.autograd.grad((first * p).sum(), z, create_graph=True)
        (third,) = torch.autograd.grad((second * p).sum(), z)
        results.append((value.detach(), first.detach(), second.detach(), third))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert float(a.abs().max()) > 1e-3


def test_seams_of_a_stationary_prior():
    # Photographs' power law, 48×48; the prior of a window is its marginal, 16×16, exactly.
    rows = torch.fft.fftfreq(48, dtype=torch.float64)
    power = (rows[:, None] ** 2 + rows**2).clamp_min(48**-2).reciprocal()
    power = 0.25 * power / power.mean()
    whole = GaussianPrior(torch.zeros(1, 48, 48).double(), StationaryCovariance(power[None, None]))
    i = torch.arange(16)
    lag = (i[:, None] - i) % 48
    covariance = torch.fft.ifft2(power).real[lag[:, None, :, None], lag[None, :, None, :]]
    window = GaussianPrior(
        torch.zeros(1, 16, 16).double(), DenseCovariance(covariance.reshape(1, 256, 256))
    )
    level = whole.schedule[200]
    x0 = whole.sample(8, torch.Generator().manual_seed(0))
    x = level.alpha * x0 + level.sigma * randn(*x0.shape)
    exact = whole(x, level).x0

    def errors(overlap: int) -> tuple[float, float]:
        """RMS difference from the exact x̂₀, at the windows' borders and elsewhere."""
        tiled = Tiled(window, overlap=overlap)
        error = (tiled(x, level).x0 - exact).square().mean(dim=(0, 1))
        seams = torch.zeros(48, dtype=torch.bool)
        for start, _ in _axis(48, 16, overlap):
            for edge in {start, start + 16} - {0, 48}:
                seams[edge - 1 : edge + 1] = True
        at, inside = seams[:, None] | seams, slice(4, 44)  # the whole's border is periodic
        error, at = error[inside, inside], at[inside, inside]
        return float(error[at].mean().sqrt()), float(error[~at].mean().sqrt())

    truth = float((exact - x0).square().mean().sqrt())
    seam, elsewhere = errors(overlap=8)
    assert seam < 1.3 * elsewhere < 0.3 * truth
    hard, _ = errors(overlap=0)
    assert hard > 2 * seam


def test_smaller_images_are_one_window_where_the_network_allows():
    free = Tiled(Local(image_shape=(1, None, None)), size=8, overlap=2)
    x = randn(1, 1, 5, 12)
    assert free(x, LEVEL).x0.shape == x.shape
    free.check((1, 5, 12))
    fixed = Tiled(Local(), overlap=2)
    with pytest.raises(InputError, match=r"1×5×8 .*the network takes 1×8×8"):
        fixed.check((1, 5, 12))
    with pytest.raises(InputError, match="the network takes 1×any×any"):
        fixed.rehearse((3, 16, 16))
    network = UNet(1, 32, (1, 1), attention_levels=(), patch_size=2)
    patched = Tiled(NetworkDenoiser(network, None, image_shape=(1, None, None)), size=16)
    patched.rehearse((1, 17, 31))
    with pytest.raises(InputError, match="multiples of 4"):
        patched.rehearse((1, 17, 15))


def test_what_it_says_of_itself():
    prior = shipped_prior("fashion-mnist")
    tiled = Tiled(prior, overlap=8)
    assert tiled.image_shape == (1, None, None)
    for name in ("schedule", "value_range", "learns_variance", "derivatives"):
        assert getattr(tiled, name) == getattr(prior, name)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(tiled(x, LEVEL).x0, prior(x, LEVEL).x0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 16}, "Windows of 16×16 .*takes 8×8"),
        ({"overlap": 8}, "overlap must be a whole number, at least 0 and below 8, got 8"),
        ({"overlap": -1}, "overlap must be"),
        ({"tiles_at_once": 0}, "tiles_at_once must be a whole number, at least 1"),
    ],
)
def test_impossible_windows(options, words):
    with pytest.raises(InputError, match=words):
        Tiled(Local(), **options)
    with pytest.raises(InputError, match="set the size of the windows"):
        Tiled(Local(image_shape=(1, None, None)))


@pytest.mark.parametrize("tile", [None, 32, 16])
def test_the_shell_tiles(tile):
    prior = shipped_prior("fashion-mnist")
    if tile:
        prior.image_shape = (1, None, None)
    sampler = PosteriorSampler(prior, guidances=[DPS(1.0)], num_steps=2, tile=tile)
    x = torch.rand(1, 1, 48, 32) * 2 - 1
    restored = sampler.predict_step({"x": x, "id": ["a"]})["restored"]
    assert restored.shape == x.shape
    side = tile or 32  # a network of one size is tiled by itself, others when asked
    assert f"in windows of {side}×{side}" in sampler.describe()["prior"]


def test_the_shell_tiles_no_smaller_or_other_images():
    sampler = PosteriorSampler(shipped_prior("fashion-mnist"))
    for shape in ((1, 16, 64), (3, 64, 64)):
        with pytest.raises(InputError, match="the network takes 1×32×32"):
            sampler.predict_step({"x": torch.zeros(1, *shape), "id": ["a"]})


def kept(denoiser: Denoiser, size: int) -> int:
    """Bytes that the graph of x̂₀ keeps, without the parameters."""
    x = torch.randn(1, 1, size, size, requires_grad=True)
    return graph_bytes(denoiser, lambda: denoiser(x, LEVEL).x0.sum())


def test_a_graph_keeps_windows_alone():
    prior = shipped_prior("fashion-mnist")
    image = 4 * 64 * 64
    assert kept(Tiled(prior, overlap=8), 64) < 12 * image
    assert kept(prior, 64) > 100 * image


def test_autocast_is_remembered_where_windows_are_computed_again():
    prior = shipped_prior("fashion-mnist")
    low = Autocast(Tiled(prior, overlap=8), torch.bfloat16)
    seen = []
    prior.network.out[2].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    x = torch.randn(1, 1, 32, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(low(x, LEVEL).x0.sum(), x)
    assert gradient.dtype == torch.float32
    assert seen == [torch.bfloat16] * 2  # forward, and once more for the product


SCRIPT = """
import resource, sys, torch
from cmi_lightning.denoisers import NetworkDenoiser, Tiled, UNet
from cmi_lightning.guidance import DPS
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM
width, size, steps, tiled = map(int, sys.argv[1:])
torch.manual_seed(0)
network = UNet(3, width, (1, 1, 2, 2, 4, 4), attention_levels=(4,), learn_variance=True,
               checkpoint=True)
shape = (3, 256, 256) if tiled else (3, None, None)
prior = NetworkDenoiser(network, None, image_shape=shape)
prior = Tiled(prior, tiles_at_once=1) if tiled else prior
like = torch.zeros(1, 3, size, size)
noise = SampleNoise(0, ["a"])
problem = Problem(like, Identity(), 0.1)
x = Sampler(prior, DDPM("learned"), [DPS(1.0)], num_steps=steps).run(problem, noise, like)
assert bool(torch.isfinite(x).all()) and x.shape == like.shape
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(*arguments: int) -> float:
    """Peak memory, in MiB, of a process that restores one image with FFHQ's architecture."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 128])
def test_memory_of_the_ffhq_architecture(width):
    # Per tile, not per image: 512×512 in windows takes little more than 256×256.
    small, large = peak(width, 256, 1, 1), peak(width, 512, 1, 1)
    assert large < small + 150
    assert large < peak(width, 512, 1, 0) - 150
