"""Blur by a kernel of each image's own: any kernel, or a random motion blur."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError, counted
from cmi_lightning.linalg import per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator
from cmi_lightning.operators.separable import (
    Padding,
    boundary,
    constant_per_channel,
    reciprocal,
)


@dataclass(frozen=True, eq=False)
class Convolution(LinearOperator):
    """y_i = Σ_j k_j x_{i + j − c}: each channel correlated with its image's kernel, by FFT.

    c = (⌊kh/2⌋, ⌊kw/2⌋) is the kernel's centre. Measurements have the size of the images, and
    kernels may be larger than those. With circular padding A is diagonal in Fourier space: solve is
    a division, and A⁺ leaves out singular values |k̂| < rcond · max |k̂|. With reflected padding
    solve takes conjugate gradients, and A⁺ is damped instead, Aᵀ (AAᵀ + (rcond · Σ|k|)²)⁻¹; it
    nears the exact A⁺ as rcond → 0. Either way A⁺y magnifies noise at most about 1/rcond times.

    >>> A = Convolution(torch.tensor([[[0.0, 0.0, 1.0]]]), "circular")  # y_i = x_{i + 1}
    >>> A(torch.tensor([[[[1.0, 2.0, 4.0]]]])).round()
    tensor([[[[2., 4., 1.]]]])

    Args:
        kernels: (B, kh, kw), or (1, kh, kw) for one kernel for all images.
        padding: what lies outside the image: its mirror image without the outermost pixel
            ("reflect", as in the DPS code) or its other end ("circular").
        rcond: relative size of singular values below which A⁺ is truncated or damped, in [0, 1).

    Raises:
        InputError: if ``kernels`` are of another shape.
    """

    kernels: Tensor
    padding: Padding = "reflect"
    rcond: float = number(0.1, "[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernels.ndim != 3 or 0 in self.kernels.shape:
            raise InputError(
                f"Blur kernels must be of shape (batch, height, width), got "
                f"{tuple(self.kernels.shape)}."
            )

    @property
    def images(self) -> int | None:  # type: ignore[override]
        """The number of kernels; None for one kernel for all images."""
        return len(self.kernels) if len(self.kernels) > 1 else None

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        if len(self.kernels) not in (1, len(noise.ids)):
            raise InputError(
                f"Got {counted(len(self.kernels), 'blur kernel')} for "
                f"{counted(len(noise.ids), 'image')}; give one "
                "kernel, or one for each image."
            )
        bound = type(self)(self.kernels.to(like), self.padding, self.rcond)
        object.__setattr__(bound, "image_shape", image_shape)
        return bound

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.padding == "circular":
            return _filter(x, self._transfer(x).conj())
        rows, columns = self._border(x)
        padded = x.index_select(2, rows).index_select(3, columns)
        return _filter(padded, self._spectrum(padded).conj())[..., :height, :width]

    def adjoint(self, y: Tensor) -> Tensor:
        if self.padding == "circular":
            return _filter(y, self._transfer(y))
        rows, columns = self._border(y)
        padded = torch.nn.functional.pad(
            y, (0, len(columns) - y.shape[3], 0, len(rows) - y.shape[2])
        )
        padded = _filter(padded, self._spectrum(padded))
        tall = padded.new_zeros(*padded.shape[:3], y.shape[3]).index_add(3, columns, padded)
        return torch.zeros_like(y).index_add(2, rows, tall)

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (A Aᵀ + diag(shift))⁻¹ y.

        Closed form for circular padding and a shift per sample (or per channel), else conjugate
        gradients. Without shift, directions in which A is zero are left out.
        """
        added = per_sample(shift, y)
        if self.padding == "reflect" or not constant_per_channel(added):
            return super().solve(y, added)
        return _filter(y, reciprocal(_amplitude(self._transfer(y)) ** 2 + added))

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return V f(s) Vᵀ x for circular padding: a filter, (B, C, H, W) → (B, C, H, W)."""
        if self.padding == "reflect":
            return super().spectral(x, f)
        return _filter(x, f(_amplitude(self._transfer(x))))

    def pinv(self, y: Tensor) -> Tensor:
        if self.padding == "reflect":
            return self.adjoint(self.solve(y, (self.rcond * self.kernels.abs().sum((1, 2))) ** 2))
        transfer = self._transfer(y)
        size = _amplitude(transfer)
        inverse = reciprocal(size, self.rcond * size.amax((2, 3), keepdim=True))
        return _filter(y, transfer * inverse**2)

    def _border(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows and the columns of x that make up the padded image."""
        rows, columns = (
            boundary(n, k // 2, k - 1 - k // 2, "reflect", x.device)
            for n, k in zip(x.shape[2:], self.kernels.shape[1:], strict=True)
        )
        return rows, columns

    def _spectrum(self, padded: Tensor) -> Tensor:
        """Return the kernels' Fourier transform on the padded grid, (B, 1, ·, ·)."""
        height, width = padded.shape[2:]
        kernels = self.kernels
        padding = (0, width - kernels.shape[2], 0, height - kernels.shape[1])
        return _spectrum_of(torch.nn.functional.pad(kernels, padding))[:, None]

    def _transfer(self, x: Tensor) -> Tensor:
        """Return the Fourier transform of the kernels, centred at the origin and wrapped."""
        wrapped = self.kernels
        for axis in (1, 2):
            taps, size = wrapped.shape[axis], x.shape[axis + 1]
            place = (torch.arange(taps, device=x.device) - taps // 2) % size
            shape = [size if a == axis else n for a, n in enumerate(wrapped.shape)]
            wrapped = wrapped.new_zeros(shape).index_add(axis, place, wrapped)
        return _spectrum_of(wrapped)[:, None]


@dataclass(frozen=True)
class MotionBlur(LinearOperator):
    """Blur along the path of a shaken camera, a random one for each image.

    The path is a chain of steps: lengths ~ Beta(1, 30), directions ~ triangular with a side that
    rarely flips; both spreads grow with ``intensity``. It is drawn at twice the size, softened and
    reduced. Kernels are ≥ 0 and sum to 1, and depend on the seed and the image's id alone.
    They are not centred: at 61×61 the centre of mass lies 1.6 pixels from the kernel's centre on
    average, by (0.3, 0.0) in the mean, and y is shifted by as much. It becomes a
    :class:`Convolution`.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, MotionBlur(5), 0.05, noise).y.shape
    torch.Size([2, 1, 8, 8])

    Args:
        kernel_size: side of the kernel in pixels, at least 1.
        intensity: 0 for a straight line, up to 1 for a crooked path.
        padding: "reflect" (as in the DPS code) or "circular"; see :class:`Convolution`. Circular
            padding has exact, fast solves, where reflection needs conjugate gradients.
        rcond: A⁺ is truncated or damped below singular values of rcond; see :class:`Convolution`.

    Source: the "motionblur" package (Borodenko, 2020), which the DPS code (Chung et al., 2023)
    uses with one kernel for all images.
    """

    kernel_size: int = number(61, "[1, inf)")
    intensity: float = number(0.5, "[0, 1]")
    padding: Padding = "reflect"
    rcond: float = number(0.1, "[0, 1)")

    def kernel(self, random: np.random.Generator) -> Tensor:
        """Draw one kernel (kernel_size, kernel_size), float64."""
        from PIL import Image, ImageDraw, ImageFilter

        canvas = 2 * self.kernel_size
        diagonal = canvas * math.sqrt(2)
        points = _path(diagonal, self.intensity, random) + complex(
            self.kernel_size, self.kernel_size
        )
        image = Image.new("L", (canvas, canvas))
        line = [(float(p.real), float(p.imag)) for p in points]
        ImageDraw.Draw(image).line(line, fill=255, width=max(int(diagonal / 150), 1))
        image = image.filter(ImageFilter.GaussianBlur(int(0.01 * diagonal)))
        image = image.resize((self.kernel_size, self.kernel_size), Image.Resampling.LANCZOS)
        kernel = torch.from_numpy(np.array(image, dtype=np.float64))
        if not kernel.any():  # a path around the canvas, or of one point
            kernel[self.kernel_size // 2, self.kernel_size // 2] = 1
        return kernel / kernel.sum()

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Convolution:
        kernels = []
        for row in range(len(noise.ids)):
            seed = torch.randint(2**62, (), generator=noise.generator(row, "kernel"))
            kernels.append(self.kernel(np.random.default_rng(int(seed))))
        operator = Convolution(torch.stack(kernels), self.padding, self.rcond)
        return operator.bind(image_shape, noise, like)


def _path(diagonal: float, intensity: float, random: np.random.Generator) -> np.ndarray:
    """Return the points of a random path about its centre of mass, as complex numbers."""
    longest = 0.75 * diagonal * (random.uniform() + random.uniform(0, intensity**2))
    unit = (1.1 - intensity) * diagonal
    # Steps are Beta(1, 30) below the length of the path, by inversion of 1 − (1 − s)³⁰.
    below = 1 - (1 - min(longest / unit, 1)) ** 30
    steps: list[float] = []
    while sum(steps) < longest or not steps:
        steps.append(unit * (1 - (1 - random.uniform(0, below)) ** (1 / 30)))

    widest = random.uniform(0, intensity * math.pi)
    flips = random.beta(2, 20)
    heading = random.uniform(-widest, widest)
    headings = [heading]
    for _ in steps[1:]:
        side = math.copysign(1, heading) * (-1 if random.uniform() < flips else 1)
        heading = side * random.triangular(0, intensity * widest, widest + 0.1)
        headings.append(heading)

    points = np.cumsum(np.array(steps) * np.exp(1j * np.array(headings)))
    return (points - points.mean()) * np.exp(1j * random.uniform(0, math.pi))


def _filter(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply x by a real filter's half spectrum."""
    height, width = x.shape[2:]
    return torch.stack([torch.fft.irfft2(s, s=(height, width)) for s in _spectrum_of(x) * transfer])


def _spectrum_of(x: Tensor) -> Tensor:
    """Return the half spectrum of each image, one transform a sample.

    A transform of a whole batch rounds differently than those of its samples.
    """
    return torch.stack([torch.fft.rfft2(sample) for sample in x])


def _amplitude(transfer: Tensor) -> Tensor:
    """Return |transfer| (B, 1, ·, ·), with 0 for what is below rounding error."""
    size = transfer.abs()
    return torch.where(
        size > torch.finfo(size.dtype).eps * size.amax((2, 3), keepdim=True), size, 0
    )
