"""Priors for images of other channels than their network's: gray on RGB, RGB on gray."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from cmi_lightning.denoisers.base import Denoiser, Prediction
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level


def _wrap(wrapper: Denoiser, denoiser: Denoiser, channels: int, needed: int) -> None:
    """Take over what a denoiser says of itself, but for the channels of its images."""
    shape = denoiser.image_shape or (None, None, None)
    if shape[0] not in (needed, None):
        raise InputError(
            f"{type(wrapper).__name__} wraps a prior for images of {needed} channels, and this "
            f"one's have {shape[0]}."
        )
    wrapper.image_shape = (channels, *shape[1:])
    wrapper.value_range, wrapper.learns_variance = denoiser.value_range, denoiser.learns_variance
    wrapper.derivatives, wrapper.size_multiple = denoiser.derivatives, denoiser.size_multiple


class AsGray(Denoiser):
    """Gray images under an RGB prior: the mean over channels of what it says of a gray RGB image.

    A gray image as RGB has three equal channels, and noise at an RGB level (α, σ_c) splits into its
    mean over the channels, of standard deviation σ_c/√3, and the rest, which lies in the colour
    directions and says nothing of a gray image. So the gray level (α, σ) is the RGB level
    (α, √3 σ), and the network is shown g_t plus noise √3 σ n with n ~ N(0, I − 11ᵀ/3), which is
    distributed as what it was trained on; ĝ₀ is the mean over channels of its x̂₀.

    Exact, whatever n, for priors of gray images and for Gaussian ones whose channels are
    exchangeable. For other colour priors an approximation: they are told, with the uncertainty of
    noise √3 σ, that the image has no colour. n is one fixed pattern per level and image
    size, the same for every image, so that x̂₀ stays a differentiable function of x_t alone. A
    learned variance is averaged over the channels, too.

    Args:
        denoiser: a prior for RGB images.

    Raises:
        InputError: if its images have not 3 channels.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        _wrap(self, denoiser, channels=1, needed=3)
        self.denoiser = denoiser
        self.schedule = denoiser.schedule.scale_noise(1 / math.sqrt(3))

    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return ĝ₀ of g_t (B, 1, H, W)."""
        sigma = math.sqrt(3) * level.sigma
        # Drawn on the CPU in float32, so that every device and precision sees the same numbers.
        key = f"{float(level.time)!r}\0{tuple(x.shape[-2:])}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 3, *x.shape[-2:], generator=generator).to(x)
        colour = sigma * (noise - noise.mean(dim=1, keepdim=True))
        prediction = self.denoiser(x + colour, Level(level.alpha, sigma, level.time))
        fraction = prediction.variance_fraction
        return Prediction(
            prediction.x0.mean(dim=1, keepdim=True),
            None if fraction is None else fraction.mean(dim=1, keepdim=True),
        )


class AsRGB(Denoiser):
    """Colour images under a gray prior: every channel is a gray image of its own.

    Exact for a prior under which the channels are independent; what real channels have in common
    is not used, so that colours may drift apart where little is measured.

    Args:
        denoiser: a prior for gray images.
        channels: channels of the images, 4 for RGBA.

    Raises:
        InputError: if its images have not 1 channel.
    """

    def __init__(self, denoiser: Denoiser, channels: int = 3) -> None:
        super().__init__()
        _wrap(self, denoiser, channels=channels, needed=1)
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return x̂₀ of x_t (B, C, H, W)."""
        x0, fraction = self.denoiser(x.flatten(0, 1)[:, None], level)
        return Prediction(
            x0.reshape(x.shape), None if fraction is None else fraction.reshape(x.shape)
        )
