"""Bicubic downsampling against Pillow; image metrics of real runs against scikit-image."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn
from PIL import Image
from predicting import items, restore
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from cmi_lightning import PosteriorSampler
from cmi_lightning.callbacks import ImageWriter, RestorationMetrics
from cmi_lightning.denoisers import Denoiser
from cmi_lightning.exact import GaussianMixture
from cmi_lightning.guidance import DPS
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Downsample, GaussianBlur, LinearOperator


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_downsampling_is_pillows_inside(factor):
    """Pillow stretches the same cubic (a = −½) and divides by the sum of its weights.

    At the borders it leaves out what is not there, where MATLAB and we mirror the image: two pixels
    on every side differ. Its images of mode "F" are float32.
    """
    size = (9 * factor, 11 * factor)
    x = randn(1, 1, *size, dtype=torch.float32).double()
    y = Downsample(factor).bind((1, *size), SampleNoise(0, ["a"]), x)(x)[0, 0].numpy()
    image = Image.fromarray(x[0, 0].float().numpy())
    assert image.mode == "F"
    theirs = np.asarray(image.resize((11, 9), Image.Resampling.BICUBIC))
    inside = (slice(2, -2), slice(2, -2))
    assert np.abs(y[inside] - theirs[inside]).max() < 1e-6 * np.abs(theirs).max()
    assert np.abs(y - theirs).max() > 1e-3


def run(
    folder: Path, prior: Denoiser, operator: LinearOperator, x: Tensor
) -> tuple[list[dict[str, str]], list[np.ndarray]]:
    """Restore images x; return the rows of metrics.csv and the PNGs as (H, W, C) of 0 … 255."""
    module = PosteriorSampler(prior, operator, guidances=[DPS(0.5)], num_steps=4)
    restore(folder, module, items(x), RestorationMetrics(lpips=None, fid=False), ImageWriter())
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = []
    for row in rows:
        with Image.open(folder / "restored" / f"{row['id']}.png") as image:
            images.append(np.asarray(image).reshape(*x.shape[2:], -1))
    return rows, images


def check(rows: list[dict[str, str]], images: list[np.ndarray], x: Tensor) -> None:
    assert len(rows) == len(images) == len(x)
    for row, image, truth in zip(rows, images, x, strict=True):
        pixels = (truth.double() * 0.5 + 0.5).clamp(0, 1) * 255
        known = pixels.round().permute(1, 2, 0).numpy() / 255
        restored = image / 255
        psnr = peak_signal_noise_ratio(known, restored, data_range=1.0)
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-4)
        wide = [np.pad(v, ((5, 5), (5, 5), (0, 0)), mode="reflect") for v in (known, restored)]
        ssim = structural_similarity(
            *wide,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=2,
        )
        assert float(row["ssim"]) == pytest.approx(ssim, abs=1e-5)


def test_metrics_of_wide_colour_images(tmp_path):
    """PSNR and SSIM where height, width and channels differ; SSIM is the mean over channels.

    SSIM is Wang et al.'s: 11×11 Gaussian window of σ = 1.5, population covariance,
    K = (0.01, 0.03), data range 1. Borders are reflected, which skimage is given as a wider image:
    it leaves out 5 pixels on every side.
    """
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 5, 9, generator=g) * 2 - 1
    x = torch.nn.functional.interpolate(coarse, size=(20, 45), mode="bilinear")
    prior = GaussianMixture(torch.zeros(1, 3, 20, 45), 0.3)
    rows, images = run(tmp_path, prior, GaussianBlur(9, 1.5), x)
    check(rows, images, x)
