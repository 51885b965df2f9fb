"""Operators that pick pixels: all of them (denoising) or some (inpainting)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.linalg import per_sample
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators.base import LinearOperator


@dataclass(frozen=True)
class Identity(LinearOperator):
    """y = x₀ + n (denoising): A = I, measurements (B, C, H, W).

    >>> Identity()(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        return y / (1 + per_sample(shift, y))

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return f(x.new_ones(())) * x

    def pinv(self, y: Tensor) -> Tensor:
        return y


@dataclass(frozen=True, eq=False)
class PixelMask(LinearOperator):
    """y[b, c, i] = x[b, c, index[b, c, i]]: the known pixels of each image, as a list (B, C, m).

    The positions are an image's own, and the same in all its channels unless the mask has them. AAᵀ
    is the identity, so A⁺ is Aᵀ: known pixels at their places, 0 elsewhere. Where images or
    channels keep unequal numbers of pixels, the lists are padded to the longest with rows in which
    A is zero.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> A = PixelMask.from_mask(torch.tensor([[[1, 0], [0, 1]]]), x)
    >>> A(x), A.pinv(A(x)).flatten()
    (tensor([[[0., 3.]]]), tensor([0., 0., 0., 3.]))

    Args:
        index: positions in the flattened channel (B, 1 or C, m), int64, none twice.
        valid: False at padding (B, 1 or C, m).
        image_shape: (C, H, W).
    """

    index: Tensor
    valid: Tensor
    image_shape: tuple[int, ...]

    @property
    def images(self) -> int | None:  # type: ignore[override]
        """The number of masks; None for one mask for all images."""
        return len(self.index) if len(self.index) > 1 else None

    @classmethod
    def from_mask(cls, mask: Tensor, like: Tensor) -> Self:
        """Make the operator from a mask.

        Args:
            mask: (B, H, W), or (B, C, H, W) with one for each channel; B = 1 serves all images.
                True, or above 0.5, is known.
            like: a tensor of the images' shape (B, C, H, W), on their device.

        Raises:
            InputError: if the mask is of another shape, or knows no pixel of any image.
        """
        batch, channels, height, width = like.shape
        shape = tuple(mask.shape)
        mask = mask[:, None] if mask.ndim == 3 else mask
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, channels)
        if not fits or mask.shape[2:] != like.shape[2:]:
            need = " or ".join(str((n, height, width)) for n in sorted({1, batch}, reverse=True))
            raise InputError(
                f"The mask is of shape {shape} and the images need {need}; resize the mask."
            )
        known = mask.to(like.device).expand(batch, -1, -1, -1).flatten(2) > 0.5
        counts = known.sum(2, keepdim=True)
        longest = int(counts.max())
        if longest == 0:
            raise InputError(
                f"The mask removes every pixel of images {height}×{width}; choose a smaller "
                "fraction or box, or check that known pixels are above 0.5."
            )
        # A stable sort lists known pixels in reading order and pads with removed ones, so that an
        # index never occurs twice.
        order = known.logical_not().to(torch.uint8).argsort(dim=2, stable=True)
        valid = torch.arange(longest, device=like.device) < counts
        return cls(order[..., :longest], valid, (channels, height, width))

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        count = len(noise.ids)
        made = (self.images or count, *self.image_shape[1:])
        given = (count, *image_shape[1:])
        if made != given or self.index.shape[1] not in (1, image_shape[0]):
            raise InputError(
                f"The mask is made for images of (number, height, width) {made}, not {given}; make "
                "it anew for these."
            )
        index, valid = (t.expand(count, -1, -1).to(like.device) for t in (self.index, self.valid))
        return type(self)(index, valid, image_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.zero_padding(x.flatten(2).gather(2, self.index.expand(*x.shape[:2], -1)))

    def zero_padding(self, y: Tensor) -> Tensor:
        return y.masked_fill(~self.valid, 0)

    def sample_noise(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Return one random number per known pixel, drawn per pixel of the image; 0 at padding."""
        return self.forward(draw(y.new_empty(len(y), *self.image_shape)))

    def adjoint(self, y: Tensor) -> Tensor:
        height, width = self.image_shape[1:]
        flat = y.new_zeros(*y.shape[:2], height * width)
        flat = flat.scatter(2, self.index.expand(*y.shape[:2], -1), self.zero_padding(y))
        return flat.unflatten(2, (height, width))

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return y / (1 + shift), at padding y / shift; 0 at padding without shift."""
        total = self.valid + per_sample(shift, y)
        return torch.where(total > 0, y, 0) / torch.where(total > 0, total, 1)

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(1) x at known pixels, f(0) x elsewhere."""
        known = self.adjoint(self(torch.ones_like(x))) > 0
        return torch.where(known, f(x.new_ones(())), f(x.new_zeros(()))) * x

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)


@dataclass(frozen=True, eq=False)
class Inpaint(LinearOperator):
    """Keep the known pixels of a mask of your own. It becomes a :class:`PixelMask`.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(2, 3, 4, 4), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, Inpaint(torch.eye(4)), 0.05, noise).y.shape
    torch.Size([2, 3, 4])

    Args:
        mask: known pixels, True or above 0.5: (H, W) for all images, (C, H, W) with one for each
            channel, or (B, 1 or C, H, W) with one for each image. Or an image or ``.npy`` file,
            in which white is known and black is missing.

    Raises:
        InputError: when it meets images, if the file cannot be read or the sizes differ.
    """

    mask: str | Tensor

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        if isinstance(self.mask, (str, Path)):
            from cmi_lightning.data.extras import read_mask

            mask = read_mask(Path(self.mask).expanduser(), tuple(image_shape[1:]))
        else:
            mask = torch.as_tensor(self.mask)
        if mask.ndim < 4:
            mask = mask[None]
        batch = like.new_empty(()).expand(len(noise.ids), *image_shape)
        return PixelMask.from_mask(mask, batch)


@dataclass(frozen=True)
class RandomMask(LinearOperator):
    """Remove round(fraction·H·W) pixels of each image, drawn without replacement.

    Every image has a mask of its own, which depends on the seed and the image's id alone.
    It becomes a :class:`PixelMask`; measurements are (B, C, m).

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, RandomMask(0.75), 0.05, noise).y.shape
    torch.Size([2, 1, 16])

    Args:
        fraction: the share of pixels to remove, in [0, 1).

    Source: the random inpainting of DPS (Chung et al., 2023), which draws one share per image.
    """

    fraction: float = number(0.9, "[0, 1)")

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        pixels = image_shape[1] * image_shape[2]
        removed = round(self.fraction * pixels)
        known = torch.ones(len(noise.ids), pixels, dtype=torch.bool)
        for row in range(len(known)):
            order = torch.randperm(pixels, generator=noise.generator(row, "mask"))
            known[row, order[:removed]] = False
        batch = like.new_empty(()).expand(len(known), *image_shape)
        return PixelMask.from_mask(known.unflatten(1, image_shape[1:]), batch)


@dataclass(frozen=True)
class BoxMask(LinearOperator):
    """Remove one box of each image, placed uniformly with a margin on all sides.

    top ~ U{margin, …, H − margin − h}, left ~ U{margin, …, W − margin − w}. Every image has a box
    of its own, which depends on the seed and the image's id alone. It becomes a
    :class:`PixelMask`; measurements are (B, C, H·W − h·w). Lengths are whole pixels, or shares of
    the image's height and width: 0.5 is half of each, rounded.

    >>> from cmi_lightning import Problem
    >>> x, noise = torch.zeros(2, 1, 8, 8), SampleNoise(0, ["a", "b"])
    >>> Problem.simulate(x, BoxMask(4, margin=1), 0.05, noise).y.shape
    torch.Size([2, 1, 48])
    >>> Problem.simulate(x, BoxMask(0.25, margin=0.125), 0.05, noise).y.shape
    torch.Size([2, 1, 60])

    Args:
        size: side of the box, or (height, width): pixels, at least 1, or shares below 1.
        margin: what stays on every side: pixels, at least 0, or a share below 0.5.

    Raises:
        InputError: if an option is out of range.

    Source: the box inpainting of DPS (Chung et al., 2023).
    """

    size: int | float | tuple[int | float, int | float] = 128
    margin: int | float = 16

    def __post_init__(self) -> None:
        fit = [_is_length(side) and side > 0 for side in self._box]
        if fit != [True, True] or not _is_length(self.margin):
            raise InputError(
                "BoxMask.size must be whole pixels, at least 1, or a share of the image below 1; "
                f"BoxMask.margin the same, or 0; got {self.size} and {self.margin}."
            )

    @property
    def _box(self) -> Sequence[int | float]:
        return self.size if isinstance(self.size, tuple | list) else (self.size, self.size)

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        sides = image_shape[1:]
        height, width = (max(1, _pixels(k, n)) for k, n in zip(self._box, sides, strict=True))
        margins = [_pixels(self.margin, n) for n in sides]
        free = [n - 2 * m - k for n, m, k in zip(sides, margins, (height, width), strict=True)]
        if min(free) < 0:
            raise InputError(
                f"A box of {height}×{width} with a margin of {self.margin} on each side does not "
                f"fit into images of {sides[0]}×{sides[1]}; lower BoxMask.size or BoxMask.margin."
            )
        known = torch.ones(len(noise.ids), *image_shape[1:], dtype=torch.bool)
        for row in range(len(known)):
            generator = noise.generator(row, "mask")
            top, left = (
                margin + int(torch.randint(n + 1, (), generator=generator))
                for margin, n in zip(margins, free, strict=True)
            )
            known[row, top : top + height, left : left + width] = False
        batch = like.new_empty(()).expand(len(known), *image_shape)
        return PixelMask.from_mask(known, batch)


def _is_length(value: int | float) -> bool:
    """Whether a length is whole pixels (an integer ≥ 0) or a share (another number in [0, 1))."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return value >= 0 and (isinstance(value, Integral) or value < 1)


def _pixels(length: int | float, side: int) -> int:
    """Return a length on a side of so many pixels."""
    return int(length) if isinstance(length, Integral) else round(length * side)
