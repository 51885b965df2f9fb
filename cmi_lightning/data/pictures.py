"""Pictures of every kind that Python users have, and back to the same kind."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cmi_lightning.data.images import Decoding, read_image, to_tensor
from cmi_lightning.errors import InputError, printable

KINDS = "a path, a PIL image, an array (H, W, C) or a tensor (C, H, W)"


@dataclass(frozen=True)
class Picture:
    """Images as the sampler takes them, and the way back to their own kind.

    >>> picture = Picture.of(np.zeros((4, 6, 3), np.uint8))
    >>> picture.x.shape, picture.back(picture.x).dtype
    (torch.Size([1, 3, 4, 6]), dtype('uint8'))

    Attributes:
        x: (B, C, H, W) float32 in [−1, 1].
        back: turns images (B, C, H, W) into the kind that came: PIL images for paths, uint8 or
            float in [0, 1] for arrays and tensors; values beyond the range are clamped.
        numbers: turns other numbers (B, C, H, W) into an array, or a tensor where tensors came.
        names: the name of each image; a file's without its suffix, else "00000" and so on.
    """

    x: Tensor
    back: Callable[[Tensor], Any]
    numbers: Callable[[Tensor], Any]
    names: list[str]

    @classmethod
    def of(cls, image: Any, channels: int | None = None) -> Picture:
        """Read an image, or a batch of images in one array or tensor.

        Args:
            image: a path, a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), or a tensor
                (H, W), (C, H, W) or (B, C, H, W); uint8, or floating point in [0, 1].
            channels: what files and PIL images are converted to; None keeps their own, and lays
                transparent ones on white.

        Raises:
            InputError: for another kind, range or shape.
        """
        if isinstance(image, (str, Path, Image.Image)):
            return cls._of_file(image, channels)
        if isinstance(image, (Tensor, np.ndarray)):
            return cls._of_numbers(image)
        raise InputError(f"The image must be {KINDS}; got {type(image).__name__}.")

    @classmethod
    def _of_file(cls, image: str | Path | Image.Image, channels: int | None) -> Picture:
        if isinstance(image, Image.Image):
            x, names = to_tensor(ImageOps.exif_transpose(image), Decoding(), "image"), ["00000"]
        else:
            path = Path(image).expanduser()
            if not path.is_file():
                raise InputError(f"There is no image file '{printable(path)}'.")
            x, names = read_image(path), [printable(path.stem)]
        if channels is None and len(x) == 4:
            channels = 3
        if channels not in (None, len(x)):
            x = Decoding(channels=channels).convert(x)  # type: ignore[arg-type]
        return cls(x[None], lambda x: as_images(x)[0], lambda x: _last(x[0]), names)

    @classmethod
    def _of_numbers(cls, image: Tensor | np.ndarray) -> Picture:
        given = image.detach() if isinstance(image, Tensor) else _as_tensor(image)
        last, byte = not isinstance(image, Tensor), given.dtype == torch.uint8
        kind, where = ("an array", "last") if last else ("a tensor", "first")
        if given.ndim not in (2, 3, 4) or 0 in given.shape:
            raise InputError(f"The image must be {KINDS}; got {kind} {tuple(given.shape)}.")
        x = _in_range(given)
        x = x[None, None] if x.ndim == 2 else x.reshape(-1, *x.shape[-3:])
        x = x.movedim(-1, 1) if last and given.ndim > 2 else x
        if x.shape[1] not in (1, 3, 4):
            raise InputError(
                f"The image {tuple(given.shape)} has {x.shape[1]} channels: there must be 1, 3 or "
                f"4, and they come {where} in {kind}."
            )

        def shaped(x: Tensor) -> Any:
            x = x if given.ndim == 4 else x[0] if given.ndim == 3 else x[0, :1]
            if isinstance(image, Tensor):
                return x.to(image.device) if given.ndim > 2 else x[0].to(image.device)
            return _last(x) if given.ndim > 2 else _last(x)[..., 0]

        def back(x: Tensor) -> Any:
            return shaped(to_uint8(x) if byte else _unit(x) if last else _unit(x).to(given.dtype))

        return cls(x.contiguous(), back, shaped, [f"{i:05d}" for i in range(len(x))])


def _as_tensor(image: np.ndarray) -> Tensor:
    """Return a copy of an array of either byte order (FITS files have the other one)."""
    try:
        return torch.from_numpy(image.astype(image.dtype.newbyteorder("=")))
    except TypeError as error:
        raise InputError(
            f"The image must be uint8, or float in [0, 1]; got an array of {image.dtype}."
        ) from error


def _in_range(image: Tensor) -> Tensor:
    """Return values in [−1, 1] of bytes, or of floating-point numbers in [0, 1]."""
    if image.dtype == torch.uint8:
        return image.float() / 127.5 - 1
    if not image.is_floating_point():
        raise InputError(f"The image must be uint8, or float in [0, 1]; got {image.dtype}.")
    if not bool(torch.isfinite(image).all()):
        raise InputError("The image has values that are no numbers.")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        remedy = "use (x + 1) / 2" if low >= -1 and high <= 1 else "divide by its range"
        raise InputError(
            f"The image has values from {low:g} to {high:g}; they must be in [0, 1], or uint8: "
            f"{remedy}."
        )
    return image.float() * 2 - 1


def _unit(x: Tensor) -> Tensor:
    return ((x.detach().float() + 1) / 2).clamp(0, 1)


def levels(x: Tensor, most: int = 255) -> Tensor:
    """Return round(most·clamp((x + 1)/2, 0, 1)) in float32 for x in [−1, 1]; NaN stays NaN.

    >>> levels(torch.tensor([-1.0, 0.0, 9.0]))
    tensor([  0., 128., 255.])
    """
    return _unit(x).mul(most).round()


def to_uint8(x: Tensor) -> Tensor:
    """Return :func:`levels` as bytes; what is not a number becomes 0.

    >>> to_uint8(torch.tensor([0.0, float("nan")]))
    tensor([128,   0], dtype=torch.uint8)
    """
    return levels(x).nan_to_num(0.0).to(torch.uint8)


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Return the PSNR in dB (B,) of images (B, C, H, W) in [−1, 1], clamped: 10 log₁₀(4 / MSE).

    >>> psnr(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    tensor([6.0206])
    """
    return 10 * (4 / (x.clamp(-1, 1) - truth).square().flatten(1).mean(1)).log10()


def _last(x: Tensor) -> np.ndarray:
    """Return an array with the channels last."""
    return np.ascontiguousarray(x.detach().movedim(-3, -1).cpu().numpy())


def as_images(x: Tensor) -> list[Image.Image]:
    """Return images (B, C, H, W) in [−1, 1] as PIL images, each pixel round(255 (x + 1)/2).

    >>> as_images(torch.zeros(1, 1, 2, 3))[0].getpixel((0, 0))
    128
    """
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in _last(to_uint8(x))]


def png(image: Image.Image) -> bytes:
    r"""Return a PNG file.

    >>> png(Image.new("L", (1, 1)))[:4]
    b'\x89PNG'
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """Return an image as a ``data:`` address, for a page without files."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
