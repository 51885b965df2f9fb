"""Operators that pick pixels: all of them (denoising) or some (inpainting)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

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
        """Return x."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """Return y."""
        return y

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return y / (1 + shift)."""
        return y / (1 + per_sample(shift, y))

    def pinv(self, y: Tensor) -> Tensor:
        """Return y."""
        return y


@dataclass(frozen=True, eq=False)
class PixelMask(LinearOperator):
    """y[b, c, i] = x[b, c, index[b, i]]: the known pixels of each image, as a list (B, C, m).

    The positions are an image's own and the same in all its channels. AAᵀ is the identity, so A⁺
    is Aᵀ: known pixels at their places, 0 elsewhere. Where the images of a batch keep unequal
    numbers of pixels, the lists are padded to the longest with rows in which A is zero.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> A = PixelMask.from_mask(torch.tensor([[[1, 0], [0, 1]]]), x)
    >>> A(x), A.pinv(A(x)).flatten()
    (tensor([[[0., 3.]]]), tensor([0., 0., 0., 3.]))

    Args:
        index: positions in the flattened image (B, m), int64, no position twice in an image.
        valid: False at padding (B, m).
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
            mask: (B, H, W) or, one for all images, (1, H, W); True, or above 0.5, is known.
            like: a tensor of the images' shape (B, C, H, W), on their device.

        Raises:
            InputError: if the mask is of another shape, or knows no pixel of any image.
        """
        batch, channels, height, width = like.shape
        if mask.ndim != 3 or mask.shape[0] not in (1, batch) or mask.shape[1:] != like.shape[2:]:
            raise InputError(
                f"The mask is of shape {tuple(mask.shape)} and the images need ({batch}, {height}, "
                f"{width}) or (1, {height}, {width}); resize the mask."
            )
        known = mask.to(like.device).expand(batch, -1, -1).flatten(1) > 0.5
        counts = known.sum(1)
        longest = int(counts.max())
        if longest == 0:
            raise InputError(
                f"The mask removes every pixel of images {height}×{width}; choose a smaller "
                "fraction or box, or check that known pixels are above 0.5."
            )
        # A stable sort lists known pixels in reading order and pads with removed ones, so that an
        # index never occurs twice.
        index = known.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        valid = torch.arange(longest, device=like.device) < counts[:, None]
        return cls(index, valid, (channels, height, width))

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> Self:
        """Check the images against the mask.

        Raises:
            InputError: if the mask is made for images of another size or number.
        """
        if len(self.index) == 1 and len(noise.ids) > 1:  # one mask for all images
            index, valid = (t.expand(len(noise.ids), -1) for t in (self.index, self.valid))
            return type(self)(index, valid, self.image_shape).bind(image_shape, noise, like)
        made, given = (len(self.index), *self.image_shape[1:]), (len(noise.ids), *image_shape[1:])
        if made != given:
            raise InputError(
                f"The mask is made for images of (number, height, width) {made}, not {given}; make "
                "it anew for these."
            )
        return type(self)(self.index.to(like.device), self.valid.to(like.device), image_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the known pixels, (B, C, H, W) → (B, C, m)."""
        index = self.index[:, None].expand(*x.shape[:2], -1)
        return self.zero_padding(x.flatten(2).gather(2, index))

    def zero_padding(self, y: Tensor) -> Tensor:
        """Return y (B, C, m) with zeros at padding."""
        return y.masked_fill(~self.valid[:, None], 0)

    def sample_noise(self, draw: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Return one random number per known pixel, drawn per pixel of the image; 0 at padding."""
        return self.forward(draw(y.new_empty(len(y), *self.image_shape)))

    def adjoint(self, y: Tensor) -> Tensor:
        """Return an image of the known pixels and zeros, (B, C, m) → (B, C, H, W)."""
        height, width = self.image_shape[1:]
        flat = y.new_zeros(*y.shape[:2], height * width)
        index = self.index[:, None].expand(*y.shape[:2], -1)
        flat = flat.scatter(2, index, self.zero_padding(y))
        return flat.unflatten(2, (height, width))

    def solve(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return y / (1 + shift), at padding y / shift; 0 at padding without shift."""
        total = self.valid[:, None] + per_sample(shift, y)
        return torch.where(total > 0, y, 0) / torch.where(total > 0, total, 1)

    def pinv(self, y: Tensor) -> Tensor:
        """Return A⁺ y = Aᵀ y."""
        return self.adjoint(y)


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

    Raises:
        InputError: if ``fraction`` is out of range.

    Source: the random inpainting of DPS (Chung et al., 2023), which draws one share per image.
    """

    fraction: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise InputError(
                f"RandomMask.fraction is the share of pixels removed and must be at least 0 and "
                f"below 1, got {self.fraction}."
            )

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        """Draw the masks.

        Raises:
            InputError: if the fraction leaves no pixel of such small images.
        """
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
        if not (all(fit) and _is_length(self.margin)):
            raise InputError(
                "BoxMask.size must be whole pixels, at least 1, or a share of the image below 1; "
                f"BoxMask.margin the same, or 0; got {self.size} and {self.margin}."
            )

    @property
    def _box(self) -> tuple[int | float, int | float]:
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def bind(self, image_shape: tuple[int, ...], noise: SampleNoise, like: Tensor) -> PixelMask:
        """Draw the boxes.

        Raises:
            InputError: if box and margins do not fit into such images, or leave no pixel.
        """
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
    """Whether a length is whole pixels (an int ≥ 0) or a share (a float in [0, 1))."""
    return value >= 0 if isinstance(value, int) else 0 <= value < 1


def _pixels(length: int | float, side: int) -> int:
    """Return a length on a side of so many pixels."""
    return length if isinstance(length, int) else round(length * side)
