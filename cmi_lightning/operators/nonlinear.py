"""Forward models that are not linear: intensities, exposure, quantisation, a camera's response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator, Operator
from cmi_lightning.operators.blur import MotionBlur
from cmi_lightning.operators.separable import GaussianBlur, Padding

DARK = 1e-3  # of white: below, x ↦ x^γ goes on as a line


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``x``, for rounding and clipping."""
    return x + (value - x).detach()


@dataclass(frozen=True)
class HDR(Operator):
    """y = clip(gain · x, −1, 1): an exposure that is too long. Clipped pixels have no gradient.

    >>> HDR()(torch.tensor([[-0.9, 0.3]]))
    tensor([[-1.0000,  0.6000]])

    Args:
        gain: > 0.

    Source: "high dynamic range" of RED-diff (Mardani et al., 2023) and DAPS, gain 2.
    """

    gain: float = number(2.0, "(0, inf)")

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * x).clamp(-1, 1)

    def guess(self, y: Tensor) -> Tensor:
        return y / self.gain


@dataclass(frozen=True)
class Gamma(Operator):
    """y = u^γ of intensities u = (x + 1)/2, back on [−1, 1]; odd in u, and a line near u = 0.

    f(u) = u · max(|u|, 10⁻³)^(γ − 1), which is u^γ from 10⁻³ on.

    >>> Gamma(2.0)(torch.tensor([[0.0, 1.0]]))  # u = 0.5 and 1
    tensor([[-0.5000,  1.0000]])

    Args:
        exponent: γ > 0; above 1 darkens, below 1 brightens.
    """

    exponent: float = number(2.2, "(0, inf)")

    def forward(self, x: Tensor) -> Tensor:
        u = (x + 1) / 2
        return 2 * u * u.abs().clamp_min(DARK) ** (self.exponent - 1) - 1

    def guess(self, y: Tensor) -> Tensor:
        """Return the exact inverse."""
        u, low = (y + 1) / 2, DARK**self.exponent
        power = u.abs().clamp_min(low) ** (1 / self.exponent - 1)
        return 2 * u * torch.where(u.abs() > low, power, DARK ** (1 - self.exponent)) - 1


@dataclass(frozen=True)
class Quantize(Operator):
    """y = ⌊u (2ᵇ − 1) + ½⌋/(2ᵇ − 1) of u = (x + 1)/2 clipped to [0, 1], back on [−1, 1].

    Rounding has no slope; its gradient is taken as that of x ("straight through"). The true
    likelihood of y is that of an interval, which a residual only stands for.

    >>> Quantize(1)(torch.tensor([[-0.3, 0.3, 2.0]]))
    tensor([[-1.,  1.,  1.]])

    Args:
        bits: b, from 1 to 16.

    Source: Bengio, Léonard & Courville (2013) for the gradient.
    """

    bits: int = number(2, "[1, 16]")

    def forward(self, x: Tensor) -> Tensor:
        top = 2**self.bits - 1
        levels = ((x.clamp(-1, 1) + 1) / 2 * top + 0.5).floor()
        return straight_through(2 * levels / top - 1, x)

    def guess(self, y: Tensor) -> Tensor:
        return y


@dataclass(frozen=True)
class PhaseRetrieval(Operator):
    """y = |F pad(x)| of each channel, F the unitary Fourier transform: phases are lost.

    Zeros are added on every side, ⌊oversample/8 · n⌋ of them for a side of n pixels. An image and
    its copy turned by 180° have the same y, so that draws may be either.

    >>> x = torch.ones(1, 1, 8, 8)
    >>> y = PhaseRetrieval()(x)
    >>> y.shape, bool((y.norm() - x.norm()).abs() < 1e-4)
    (torch.Size([1, 1, 12, 12]), True)

    Args:
        oversample: 2 pads by a quarter on each side.
        range: the range of what is transformed: "unit" takes (x + 1)/2, as DAPS, SITCOM, PnP-DM and
            InverseBench; "signed" takes x, as DPS and RED-diff. y differs.

    Source: Chung et al. (2023), section 4.
    """

    oversample: float = number(2.0, "[0, inf)")
    range: Literal["unit", "signed"] = "unit"

    def _borders(self, height: int, width: int) -> tuple[int, int]:
        return int(self.oversample / 8 * height), int(self.oversample / 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the amplitudes, (B, C, H, W) → (B, C, H + 2p, W + 2q), the origin centred."""
        u = (x + 1) / 2 if self.range == "unit" else x
        p, q = self._borders(*x.shape[2:])
        u = torch.nn.functional.pad(u, (q, q, p, p))
        # One transform a sample: that of a whole batch rounds differently.
        spectrum = torch.stack([torch.fft.fft2(image, norm="ortho") for image in u])
        return torch.fft.fftshift(spectrum, dim=(2, 3)).abs()

    def guess(self, y: Tensor) -> Tensor:
        """Return the image of these amplitudes with all phases 0: bright in its middle."""
        u = torch.fft.ifft2(torch.fft.ifftshift(y, dim=(2, 3)), norm="ortho").real
        height, width = self.image_shape[1:]
        p, q = self._borders(height, width)
        u = torch.fft.fftshift(u, dim=(2, 3))[..., p : p + height, q : q + width]
        return (2 * u - 1 if self.range == "unit" else u).clamp(-1, 1)


@dataclass(frozen=True)
class NonlinearBlur(Operator):
    """Blur of light behind a camera's response: y = g(clip(gain · (k ∗ g⁻¹(x)))), g = u^(1/γ).

    A moving or defocused camera averages light, not the numbers of an image file; highlights bleed,
    and saturate. The clip is smooth: 1 − softplus(1 − u), softened over ``softness``. It becomes a
    composition of :class:`Gamma`, a blur and the response.

    This is no learned blur: the "nonlinear blur" of DPS, RED-diff and DAPS is a network (BKSE) of
    images of 256×256, whose weights no package has.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(1, 1, 8, 8), SampleNoise(0, ["a"])
    >>> Problem.simulate(x, NonlinearBlur(sd=1.0), 0.0, noise).y.shape
    torch.Size([1, 1, 8, 8])

    Args:
        sd: standard deviation of a Gaussian blur in pixels, above 0; None for a random motion blur
            of each image's own, of 1/4 of the images' shorter side.
        gain: exposure, > 0.
        exponent: γ of the response, > 0.
        softness: width of the clip's knee, > 0.
        padding: of the blur.

    Source: Tai et al. (2013), "Nonlinear camera response functions and image deblurring".
    """

    sd: float | None = number(2.0, "(0, inf)")
    gain: float = number(1.2, "(0, inf)")
    exponent: float = number(2.2, "(0, inf)")
    softness: float = number(0.05, "(0, inf)")
    padding: Padding = "reflect"

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Operator:
        blur: LinearOperator = MotionBlur(max(min(image_shape[1:]) // 4, 1), padding=self.padding)
        if self.sd is not None:
            blur = GaussianBlur(sd=self.sd, padding=self.padding)
        camera = Exposure(self.gain, self.exponent, self.softness)
        return (camera @ (blur @ Gamma(self.exponent))).bind(image_shape, noise, like)


@dataclass(frozen=True)
class Exposure(Operator):
    """A camera's response: light u = gain·(x + 1)/2, smoothly clipped at white, to the power 1/γ.

    >>> Exposure(1.0, 1.0, 0.01)(torch.tensor([[-0.5, 9.0]])).round(decimals=3)
    tensor([[-0.5000,  1.0000]])
    """

    gain: float
    exponent: float
    softness: float

    def forward(self, x: Tensor) -> Tensor:
        u = self.gain * (x + 1) / 2
        clipped = 1 - self.softness * torch.nn.functional.softplus((1 - u) / self.softness)
        return Gamma(1 / self.exponent)(2 * clipped - 1)

    def guess(self, y: Tensor) -> Tensor:
        """Return the light before a clip that is taken as sharp."""
        return (Gamma(1 / self.exponent).guess(y) + 1) / self.gain - 1
