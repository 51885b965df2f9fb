"""Image files as tensors in [−1, 1]."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps
from torch import Tensor

from cmi_lightning.checked import check
from cmi_lightning.errors import InputError, cause, printable

Channels = Literal[1, 3, 4]
Note = Callable[[str], object]  # takes a predicate of "the images …"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Only these decoders: among Pillow's others are ones that start programs. The first five are tried
# on any suffix, the others on their own alone.
COMMON = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
COMMON_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp")
DECODERS = {
    **dict.fromkeys(COMMON_SUFFIXES, COMMON),
    ".gif": ("GIF",),
    ".avif": ("AVIF",),
    **dict.fromkeys((".jp2", ".j2k"), ("JPEG2000",)),
    **dict.fromkeys((".pgm", ".ppm", ".pnm"), ("PPM",)),
}
SUFFIXES = tuple(DECODERS)
FOREIGN = (  # images that people have and that are not read here
    *(".heic", ".heif", ".jxl", ".exr", ".hdr", ".psd", ".xcf", ".svg", ".tga", ".ico", ".eps"),
    *(".pdf", ".dcm", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
PLAIN = {"LA": "L", "RGBA": "RGB", "P": "RGB", "PA": "RGB"}  # modes without transparency, palette
SAME_COLOUR = 2  # of 255: a profile that changes no colour by more is sRGB
DARK = 0.1  # share of a 16-bit range under which the data likely have fewer bits
GRAY = (0.299, 0.587, 0.114)  # as in Pillow's conversion to gray


class UnreadableError(InputError):
    """A single file that no option can make readable; ``data.strict`` says what to do about it."""


@dataclass(frozen=True)
class Decoding:
    """How a file's numbers become pixels in [−1, 1].

    Args:
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps the file's own.
        background: the colour behind transparent pixels, by name or as "rgb(255, 0, 0)"; not
            used where the alpha channel is kept.
        white_level: the number that is white in files of 16 (65535) or 32 bits.
        range: the numbers that are black and white in files of floating-point numbers.

    Raises:
        InputError: if an option is senseless.

    Example:
        >>> Decoding(channels=3, background="black").background
        'black'
    """

    channels: Channels | None = None
    background: str = "white"
    white_level: int | None = None
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check(self, "channels", "range", label="data", white_level="[1, inf)")
        try:
            ImageColor.getrgb(str(self.background))
        except ValueError as error:
            raise InputError(
                f"data.background: '{printable(self.background)}' is no colour; give a name such "
                "as white, or rgb(255, 0, 0)."
            ) from error
        if self.range is not None and not self.range[0] < self.range[1]:
            raise InputError(f"data.range must be black < white, got {self.range}.")

    def convert(self, x: Tensor, own: int | None = None, note: Note = bool) -> Tensor:
        """Return x (1, 3 or 4, H, W) in [−1, 1] with ``channels`` channels, else ``own``."""
        channels = self.channels or own or len(x)
        if len(x) == 4 and channels < 4:
            colour, alpha = x[:3], (x[3:] + 1) / 2
            if bool((alpha < 1).any()):
                seen = printable(self.background)
                note(f"have transparent pixels, seen on {seen} (data.background)")
            behind = torch.tensor(ImageColor.getrgb(self.background)[:3])[:, None, None] / 127.5 - 1
            x = (colour * alpha + behind * (1 - alpha)).clamp(-1, 1)
        if len(x) == 3 and channels == 1:
            x = to_gray(x)
        if len(x) == 1 and channels > 1:
            x = x.expand(3, -1, -1)
        if len(x) == 3 and channels == 4:
            return torch.cat([x, torch.ones_like(x[:1])])
        return x.contiguous()


def read_image(path: Path, how: Decoding = Decoding(), note: Note = bool) -> Tensor:
    """Decode a whole file to (C, H, W) float32 in [−1, 1].

    The picture is turned upright as its EXIF tag says, and its colour profile is converted to sRGB
    (relative colorimetric; 16-bit colour loses its lower bits by that). 8-bit values are divided by
    255, 16-bit ones by 65535 or the white level, floating-point ones by their range. Of several
    pictures in a file the first is read.

    Args:
        path: the file.
        how: the options.
        note: called with what a person should know, as the predicate of a sentence.

    Raises:
        UnreadableError: if the file cannot be decoded, has more pixels than Pillow's limit against
            decompression bombs, or numbers whose range is unknown.
        InputError: if it holds pixels of a kind that is not supported and ``channels`` is None, or
            numbers above the white level or outside the range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of metadata; what is unreadable raises
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(path, how, note)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(
            f"The image '{printable(path)}' has more pixels than Pillow's limit of "
            f"{Image.MAX_IMAGE_PIXELS} against decompression bombs; shrink or remove it."
        ) from error
    except Exception as error:  # Pillow's decoders raise all kinds
        raise UnreadableError(
            f"Cannot read the image '{printable(path)}' ({cause(error)}); repair or remove it."
        ) from error


def _decode(path: Path, how: Decoding, note: Note) -> Tensor:
    formats = DECODERS.get(path.suffix.lower(), COMMON)
    with Image.open(path, formats=formats) as opened:
        rawmode = _rawmode(opened)
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if getattr(opened, "is_animated", False):
            note("hold several pictures, of which the first is read")
    if rawmode and not _profile(image):
        with Image.open(path, formats=formats) as opened:
            opened.tile = [_of_low_bytes(tile, rawmode) for tile in opened.tile]
            opened.load()
            low = np.asarray(ImageOps.exif_transpose(opened))
        numbers = np.asarray(image).astype(np.float32) * 256 + low
        return _deep(numbers.transpose(2, 0, 1), image.mode, image.info, path, how, note)
    return to_tensor(image, how, path, note)


def _profile(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of an image's own colours to sRGB; None where there is none to make."""
    profile = image.info.get("icc_profile")
    return _to_srgb(profile, PLAIN.get(image.mode, image.mode)) if profile else None


def to_tensor(image: Image.Image, how: Decoding, path: Path | str, note: Note = bool) -> Tensor:
    """Return an opened image, turned upright, as (C, H, W) float32 in [−1, 1]; see `read_image`."""
    mode, convert = image.mode, _profile(image)
    plain = PLAIN.get(mode, mode)
    if mode.startswith("I;16") or mode in ("I", "F"):
        return _deep(np.asarray(image)[None], mode, image.info, path, how, note)
    clear = image.has_transparency_data
    own = {"1": 1, "L": 1, "RGB": 3, "RGBA": 4, "P": 4 if clear else 3}.get(mode)
    channels = how.channels or own
    if channels is None:
        raise InputError(
            f"'{printable(path)}' has pixels of kind {mode}; set data.channels to 1, 3 or 4 to "
            "convert it."
        )
    alpha = image.convert("RGBA").getchannel("A") if clear else None
    if plain != mode:
        image = image.convert(plain)
    if convert:
        image = convert.apply(image).convert("L" if plain == "L" else "RGB")
        note("have a colour profile, which is converted to sRGB")
    if alpha is None or (channels < 4 and alpha.getextrema()[0] == 255):
        return _tensor(image.convert(MODES[channels]))
    image = image.convert("RGB")
    image.putalpha(alpha)
    return how.convert(_tensor(image), channels, note)


def _tensor(image: Image.Image) -> Tensor:
    array = np.array(image)  # a copy: torch wants to own writable memory
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array).float() / 127.5 - 1


def _deep(
    numbers: np.ndarray,
    mode: str,
    info: dict[Any, Any],
    path: Path | str,
    how: Decoding,
    note: Note,
) -> Tensor:
    """Return numbers of more than 8 bits (1, 3 or 4, H, W) as a picture."""
    option = "data.range" if mode == "F" else "data.white_level"
    low, high = 0.0, float(how.white_level or (65535 if mode != "I" else np.nan))
    if mode == "F":
        low, high = how.range or (0.0, np.nan)
    if np.isnan(high):
        raise UnreadableError(
            f"'{printable(path)}' has 32-bit pixels (kind {mode}), whose range is unknown; set "
            f"{option}, or save it with 8 or 16 bits."
        )
    colour, key, alpha = numbers[:3].astype(np.float32), info.get("transparency"), numbers[3:]
    least, most = float(colour.min()), float(colour.max())
    if not low <= least <= most <= high:
        raise InputError(
            f"'{printable(path)}' has values from {least:g} to {most:g}, outside of {low:g} to "
            f"{high:g}; set {option} to what holds for all images."
        )
    if mode not in ("I", "F") and how.white_level is None and most < DARK * high:
        note("use less than 10 % of 16 bits; if they are of fewer bits, set data.white_level")
    x = torch.from_numpy((colour - np.float32(low)) / np.float32((high - low) / 2) - 1)
    if isinstance(key, (int, tuple)) and not len(alpha):  # a colour that stands for transparency
        alpha = 65535 * (colour != np.reshape(key, (-1, 1, 1))).any(0, keepdims=True)
    if len(alpha):
        clear = torch.from_numpy(alpha.astype(np.float32) / 32767.5 - 1)
        x = torch.cat([x.expand(3, -1, -1), clear])
    return how.convert(x, len(numbers), note)


def to_gray(x: Tensor) -> Tensor:
    """Return the gray values (1, H, W) of colours (3, H, W)."""
    return (x * torch.tensor(GRAY)[:, None, None]).sum(0, keepdim=True).clamp(-1, 1)


def _rawmode(opened: Any) -> str | None:
    """Return how a file stores 16-bit colour, of which Pillow keeps the upper 8 bits; else None."""
    if opened.format == "TIFF" and opened.tag_v2.get(284) == 2 and 16 in opened.tag_v2.get(258, ()):
        raise ValueError("16 bits, one colour after the other")  # Pillow would misread it
    for tile in getattr(opened, "tile", []):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if args and re.fullmatch(r"RGBA?;16[LBN]", str(args[0])):
            return str(args[0])
    return None


def _of_low_bytes(tile: Any, rawmode: str) -> Any:
    """Return what decodes the lower 8 bits: the same in the other order of bytes."""
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    swapped = rawmode[:-1] + other[rawmode[-1]]
    args = (swapped, *tile[3][1:]) if isinstance(tile[3], tuple) else swapped
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of an image's colour profile to sRGB; None where there is none to make.

    That is, for a profile which cannot be used, is another mode's, or is sRGB.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if space != mode:
            return None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "L":
            flags |= ImageCms.Flags.NOOPTIMIZE  # its table would be 10 levels off near black
        srgb = ImageCms.createProfile("sRGB")
        result = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return None
    if mode == "CMYK":
        return result
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(*[levels] * 3), -1).reshape(27, 27, 3)
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    after = np.asarray(result.apply(Image.fromarray(colours).convert(mode)), int)
    return result if np.abs(after - colours).max() > SAME_COLOUR else None
