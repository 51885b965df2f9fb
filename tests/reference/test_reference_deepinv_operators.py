"""Operators against deepinv's own."""

import pytest
import torch
from conftest import randn
from reference_problems import BATCH, IDS, kernels, per_row, unequal_mask

from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Convolution, Downsample, PixelMask

pytest.importorskip("deepinv", reason="needs deepinv: pip install 'cmi-lightning[reference]'")
from deepinv.physics import (
    Blur,
    BlurFFT,
    DownsamplingMatlab,
    Inpainting,
)


def test_masks_are_its_inpainting():
    """deepinv's y is an image with zeros at unknown pixels: Aᵀ A x here."""
    shape, mask = (3, 9, 6), unequal_mask(BATCH, 9, 6)
    x = randn(BATCH, *shape)
    operator = PixelMask.from_mask(mask, x)
    physics = Inpainting(shape, mask[:, None].double())
    theirs = physics.A(x)
    assert torch.equal(operator.adjoint(operator(x)), theirs)
    assert torch.equal(operator.pinv(operator(x)), physics.A_dagger(theirs))


@pytest.mark.parametrize("taps", [(3, 5), (4, 3), (4, 6)], ids=str)
def test_convolution_is_its_fourier_blur(taps):
    """deepinv convolves and we correlate: its kernel is ours turned by 180°.

    Both put a kernel's centre at ⌊k/2⌋. Turning moves that of an even kernel by one pixel.
    """
    shape, x, kernel = (2, 9, 8), randn(BATCH, 2, 9, 8), kernels(1, *taps)
    physics = BlurFFT(shape, kernel.flip(1, 2)[None])
    operator = Convolution(kernel, "circular", rcond=0.0).bind(shape, SampleNoise(0, IDS), x)
    shift = tuple(taps_ % 2 - 1 for taps_ in taps)
    y = operator(x)
    assert per_row(y.roll(shift, (2, 3)), physics.A(x)) < 1e-12
    assert per_row(operator.pinv(y), physics.A_dagger(y.roll(shift, (2, 3)))) < 1e-9


@pytest.mark.parametrize("padding", ["reflect", "circular"])
def test_convolution_is_its_blur(padding):
    """As above, with a kernel for each image and deepinv's direct convolution."""
    shape, x, kernel = (2, 9, 8), randn(BATCH, 2, 9, 8), kernels(BATCH, 3, 5)
    physics = Blur(kernel.flip(1, 2)[:, None], padding=padding)
    operator = Convolution(kernel, padding).bind(shape, SampleNoise(0, IDS), x)
    y = randn(BATCH, *shape, seed=1)
    assert per_row(operator(x), physics.A(x)) < 1e-12
    assert per_row(operator.adjoint(y), physics.A_adjoint(y)) < 1e-12


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downsampling_is_its_imresize(factor):
    """MATLAB's imresize with antialiasing, borders included; deepinv derives its adjoint."""
    shape = (2, 5 * factor, 7 * factor)
    x = randn(BATCH, *shape)
    operator = Downsample(factor).bind(shape, SampleNoise(0, IDS), x)
    physics = DownsamplingMatlab(factor)
    assert per_row(operator(x), physics.A(x)) < 1e-12
    y = randn(*operator(x).shape, seed=1)
    assert per_row(operator.adjoint(y), physics.A_adjoint(y)) < 1e-12
