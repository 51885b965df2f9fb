"""Forward models of others: functions, and every kind of physics that deepinv has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmi_lightning import GaussianNoise, InputError, PoissonGaussianNoise, PoissonNoise, Problem
from cmi_lightning.exact import GaussianPrior
from cmi_lightning.guidance import CMI, DPS, PiGDM
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    Convolution,
    Inpaint,
    LinearOperator,
    from_deepinv,
    from_functions,
)
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM

try:
    from deepinv import physics as P
except ImportError:
    P = None

IDS = ["a", "b"]
NOISE = SampleNoise(0, IDS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MATRIX = draw(6, 16)


def forward(x: Tensor) -> Tensor:
    return x.flatten(1) @ MATRIX.mT


def backward(y: Tensor) -> Tensor:
    return (y @ MATRIX).reshape(-1, 1, 4, 4)


def test_functions_are_an_operator():
    x, y = draw(2, 1, 4, 4), draw(2, 6, seed=1)
    A = from_functions(forward, backward).bind((1, 4, 4), NOISE, x)
    derived = from_functions(forward).bind((1, 4, 4), NOISE, x)
    assert isinstance(A, LinearOperator)
    assert isinstance(derived, LinearOperator)
    torch.testing.assert_close(A.adjoint(y), derived.adjoint(y))
    inverse = torch.linalg.pinv(MATRIX)
    expected = (y @ inverse.mT).reshape(x.shape)
    torch.testing.assert_close(A.pinv(y), expected, rtol=1e-3, atol=1e-4)
    given = from_functions(forward, pinv=lambda y: (y @ inverse.mT).reshape(-1, 1, 4, 4))
    assert torch.equal(given.pinv(y), expected)
    curved = from_functions(torch.tanh, linear=False)
    torch.testing.assert_close(curved.vjp(x, x), x * (1 - torch.tanh(x) ** 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: from_functions(forward, lambda y: 1.1 * backward(y)),
            r"Aᵀ is not the adjoint of A. For random x and y, ⟨Ax, y⟩ = .* apart by 0\.",
        ),
        (lambda: from_functions(lambda x: forward(x) + 1), r"A is not linear, .* differ by 0\."),
        (lambda: from_functions(torch.tanh), "A is not linear"),
        (lambda: from_functions(torch.tanh, backward, linear=False), "no At or pinv"),
    ],
)
def test_wrong_functions(make, words):
    x = draw(2, 1, 4, 4)
    with pytest.raises(InputError, match=words):
        Problem.simulate(x, make(), 0.1, NOISE)


needs_deepinv = pytest.mark.skipif(
    P is None, reason="needs deepinv: pip install 'cmi-lightning[deepinv]'"
)


def coils(count: int, size: int) -> Tensor:
    maps = torch.complex(draw(1, count, size, size), draw(1, count, size, size, seed=1))
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()


def lines(size: int) -> Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., ::2] = 1
    return mask


# Image shape and physics, by what the issue names.
PHYSICS: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {
    "inpainting": ((3, 8, 8), lambda: P.Inpainting((3, 8, 8), mask=draw(3, 8, 8) > 0)),
    "blur": ((3, 8, 8), lambda: P.Blur(torch.rand(1, 1, 3, 3) / 9, padding="circular")),
    "blur-fft": ((1, 8, 8), lambda: P.BlurFFT((1, 8, 8), torch.rand(1, 1, 3, 3) / 9)),
    "mri": ((2, 8, 8), lambda: P.MRI(mask=lines(8), img_size=(8, 8))),
    "mri-of-a-real-image": ((1, 8, 8), lambda: P.MRI(mask=lines(8), img_size=(8, 8))),
    "mri-coils": (
        (2, 8, 8),
        lambda: P.MultiCoilMRI(mask=lines(8), coil_maps=coils(3, 8), img_size=(8, 8)),
    ),
    "mri-coils-of-a-real-image": (
        (1, 8, 8),
        lambda: P.MultiCoilMRI(mask=lines(8), coil_maps=coils(3, 8), img_size=(8, 8)),
    ),
    "ct": ((1, 8, 8), lambda: P.Tomography(6, 8, normalize=True)),
    "single-pixel": ((1, 8, 8), lambda: P.SinglePixelCamera(20, (1, 8, 8))),
    "hyperspectral": ((5, 8, 8), lambda: P.CompressiveSpectralImaging((5, 8, 8))),
    "unmixing": ((3, 8, 8), lambda: P.HyperSpectralUnmixing(E=3, C=6)),
    "pansharpening": ((3, 8, 8), lambda: P.Pansharpen((3, 8, 8), factor=4, srf="flat")),
    "sensing": ((1, 8, 8), lambda: P.CompressedSensing(12, (1, 8, 8))),
    "phase-retrieval": ((1, 8, 8), lambda: P.RandomPhaseRetrieval(40, (1, 8, 8))),
}


@needs_deepinv
@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("name", PHYSICS)
def test_physics_run(name):
    """DPS, ΠGDM and CMI on each, on a Gaussian prior; measurements are deepinv's own."""
    shape, make = PHYSICS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        physics = make()
    x = 0.3 * draw(2, *shape)
    operator = from_deepinv(physics, "autograd" if name == "hyperspectral" else "deepinv")
    problem = Problem.simulate(x, operator, 0.05, NOISE)
    bound = problem.operator
    if not bound.real:
        theirs = physics.A(x) if name != "phase-retrieval" else physics.A(x.to(torch.cfloat))
        ours = bound.to_ours(theirs)
        torch.testing.assert_close(bound(x), ours, rtol=1e-4, atol=1e-4)
    assert isinstance(bound, LinearOperator) == (name != "phase-retrieval")
    assert not problem.y.is_complex()
    assert bound.guess(problem.y).shape == x.shape
    prior = GaussianPrior(torch.zeros(shape))
    for guidances in ([DPS()], [PiGDM()], [CMI(), DPS()]):
        restored = Sampler(prior, DDPM(), guidances, 4).run(problem, NOISE, x)
        assert bool(restored.isfinite().all())


@needs_deepinv
def test_equals_ours():
    mask, kernel = draw(1, 8, 8) > 0, torch.rand(1, 3, 5)
    kernel = kernel / kernel.sum()
    x = draw(2, 3, 8, 8)
    theirs = from_deepinv(P.Inpainting((3, 8, 8), mask)).bind((3, 8, 8), NOISE, x)
    ours = Inpaint(mask).bind((3, 8, 8), NOISE, x)
    y = theirs(x)
    assert isinstance(theirs, LinearOperator)
    torch.testing.assert_close(y, ours.adjoint(ours(x)))
    torch.testing.assert_close(theirs.adjoint(y), y)
    torch.testing.assert_close(theirs.pinv(y), ours.pinv(ours(x)))
    blur = from_deepinv(P.BlurFFT((3, 8, 8), kernel.flip(1, 2)[None])).bind((3, 8, 8), NOISE, x)
    same = Convolution(kernel, "circular", rcond=0.0).bind((3, 8, 8), NOISE, x)
    assert isinstance(blur, LinearOperator)
    torch.testing.assert_close(blur(x), same(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blur.adjoint(x), same.adjoint(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blur.pinv(same(x)), same.pinv(same(x)), rtol=1e-2, atol=1e-2)


@needs_deepinv
def test_images_from_0_to_1_and_noise():
    u = torch.rand(2, 3, 8, 8)
    operator = from_deepinv(P.Blur(torch.ones(1, 1, 3, 3) / 9, padding="circular"))
    bound = operator.bind((3, 8, 8), NOISE, u)
    torch.testing.assert_close(bound.signed(bound(u)), bound(2 * u - 1))
    for theirs, ours in (
        (P.GaussianNoise(0.25), GaussianNoise(0.25)),
        (P.PoissonNoise(0.125), PoissonNoise(8.0)),
        (P.PoissonGaussianNoise(0.125, 0.25), PoissonGaussianNoise(8.0, 0.25, "unit")),
        (P.ZeroNoise(), GaussianNoise(0.0)),
        (P.UniformNoise(0.1), None),
    ):
        assert from_deepinv(P.Denoising(theirs)).noise == ours


@needs_deepinv
def test_images_that_do_not_suit_the_physics():
    operator = from_deepinv(P.Inpainting((3, 8, 8), draw(3, 8, 8) > 0))
    with pytest.raises(InputError, match=r"deepinv's Inpainting does not take images \(3, 6, 6\)"):
        Problem.simulate(draw(2, 3, 6, 6), operator, 0.1, NOISE)
    with pytest.raises(InputError, match="adjoint must be deepinv or autograd, got 'own'"):
        from_deepinv(P.Denoising(), adjoint="own")
    wrong = P.LinearPhysics(A=lambda x: x.cumsum(-1), A_adjoint=lambda y: y)
    spectral = P.CompressiveSpectralImaging((3, 6, 6))  # deepinv 0.5.0 rolls one pixel too few
    for physics in (wrong, spectral):
        with pytest.raises(InputError, match=r"Aᵀ is not the adjoint of A.*autograd"):
            Problem.simulate(draw(2, 3, 6, 6), from_deepinv(physics), 0.1, NOISE)
