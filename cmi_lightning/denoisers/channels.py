"""Priors for images of other channels than their network's: gray on RGB, RGB on gray."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from cmi_lightning.checked import check_value
from cmi_lightning.denoisers.base import Denoiser, Prediction, Wrapper
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level


def _shape(wrapper: Wrapper, channels: int, needed: int) -> tuple[int | None, ...]:
    """Return the image shape of a wrapper whose denoiser has the channels that it needs."""
    shape = wrapper.image_shape or (None, None, None)
    if shape[0] not in (needed, None):
        raise InputError(
            f"{type(wrapper).__name__} wraps a prior for images of {needed} channels, and this "
            f"one's have {shape[0]}."
        )
    return (channels, *shape[1:])


class AsGray(Wrapper):
    """Gray images under an RGB prior: the mean over channels of its x̂₀ of a gray RGB image.

    A gray image as RGB has three equal channels. Noise at an RGB level (α, σ_c) splits into its
    mean over the channels, of standard deviation σ_c/√3, and colour directions. These say nothing
    of a gray image. So the gray level (α, σ) is the RGB level (α, √3 σ). The network sees g_t plus
    noise √3 σ n with n ~ N(0, I − 11ᵀ/3), distributed as in its training; ĝ₀ is the mean over
    channels of its x̂₀, and so is a learned variance.

    Exact, whatever n, for priors of gray images and for Gaussian ones whose channels are
    exchangeable. Other colour priors learn, with the uncertainty of noise √3 σ, that the image has
    no colour: an approximation. n is one fixed pattern per level and image size, the same for
    every image, so that x̂₀ stays a differentiable function of x_t alone.

    Args:
        denoiser: a prior for RGB images.

    Raises:
        InputError: if its images have not 3 channels.

    >>> from cmi_lightning.denoisers import NetworkDenoiser
    >>> AsGray(NetworkDenoiser(lambda x, t: x, None, image_shape=(3, 8, 8))).image_shape
    (1, 8, 8)
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.image_shape = _shape(self, channels=1, needed=3)
        self.schedule = denoiser.schedule.scale_noise(1 / math.sqrt(3))

    def forward(self, x: Tensor, level: Level) -> Prediction:
        sigma = math.sqrt(3) * level.sigma
        # Drawn on the CPU in float32, so that every device and precision sees the same numbers.
        key = f"{float(level.time)!r}\0{tuple(x.shape[-2:])}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 3, *x.shape[-2:], generator=generator).to(x)
        colour = sigma * (noise - noise.mean(dim=1, keepdim=True))
        prediction = self.denoiser(x + colour, Level(level.alpha, sigma, level.time))
        return prediction.map(lambda part: part.mean(dim=1, keepdim=True))

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (3, *shape[1:])


class AsRGB(Wrapper):
    """Colour images under a gray prior: every channel is a gray image of its own.

    Exact for a prior under which the channels are independent. It does not use what real channels
    have in common, so that colours may drift apart where little is measured.

    Args:
        denoiser: a prior for gray images.
        channels: channels of the images, 4 for RGBA.

    Raises:
        InputError: if its images have not 1 channel.

    >>> from cmi_lightning.denoisers import shipped_prior
    >>> AsRGB(shipped_prior("fashion-mnist")).image_shape
    (3, 32, 32)
    """

    def __init__(self, denoiser: Denoiser, channels: int = 3) -> None:
        super().__init__(denoiser)
        check_value("AsRGB.channels", channels, int, "[1, inf)")
        self.image_shape = _shape(self, channels=channels, needed=1)

    def forward(self, x: Tensor, level: Level) -> Prediction:
        gray = self.denoiser(x.flatten(0, 1)[:, None], level)
        return gray.map(lambda part: part.reshape(x.shape))

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape[1:])
