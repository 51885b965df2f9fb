"""Image files as tensors in [−1, 1], with every complaint made before any sampling."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cmi_lightning.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
Channels = Literal[1, 3, 4]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def find_images(folder: Path, option: str) -> dict[str, Path]:
    """Return {id: file} of a folder and its subfolders in natural order ("2" before "10").

    An id is the path relative to the folder, with slashes and without suffix. Hidden files and
    folders are passed over.

    Raises:
        InputError: if the folder is missing or holds no image, or two files share an id.
    """
    if not folder.is_dir():
        raise InputError(
            f"{option}: there is no folder '{folder}'; give a folder with image files."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        name = relative.with_suffix("").as_posix()
        if name in found:
            raise InputError(
                f"{option}: '{found[name]}' and '{path}' would share the id '{name}'; rename one."
            )
        found[name] = path
    if not found:
        raise InputError(
            f"{option}: the folder '{folder}' holds no image ({', '.join(SUFFIXES)}); give a "
            "folder that does."
        )
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def read_image(path: Path, channels: Channels | None, option: str) -> Tensor:
    """Decode a whole file to (C, H, W) float32 in [−1, 1], turned upright as its EXIF tag says.

    8-bit values are divided by 255 and 16-bit gray ones by 65535; Pillow reads 16-bit colour with 8
    bits.

    Args:
        path: the file.
        channels: 1, 3 or 4 to convert to gray, RGB or RGBA; None for the file's own.
        option: name of the option that sets ``channels``, for messages.

    Raises:
        InputError: if the file cannot be decoded, or holds pixels of a kind that is not supported.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # oddities of metadata; what is unreadable raises
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow's decoders raise all kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"Cannot read the image '{path}' ({type(error).__name__}: {reason}); repair or remove "
            "it."
        ) from error
    if image.mode.startswith("I;16"):
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 32767.5 - 1)[None]
        if channels in (3, 4):
            opaque = torch.ones_like(pixels)
            pixels = torch.cat([pixels] * 3 + [opaque] * (channels - 3))
        return pixels
    if image.mode in ("I", "F"):
        raise InputError(
            f"'{path}' has 32-bit pixels (kind {image.mode}), whose range is unknown; save it with "
            "8 or 16 bits."
        )
    if channels is not None:
        image = image.convert(MODES[channels])
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode not in MODES.values():
        raise InputError(
            f"'{path}' has pixels of kind {image.mode}; set {option} to 1, 3 or 4 to convert it."
        )
    array = np.array(image)  # a copy: torch wants to own writable memory
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array).float() / 127.5 - 1


def check_alike(shapes: dict[str, tuple[int, ...]], what: str, channels: str, size: str) -> None:
    """Check that all of a folder's images have one shape (C, H, W).

    Args:
        shapes: shape of each image, by name.
        what: the option the images come from, for the message.
        channels: what to do about mixed channel counts.
        size: what to do about mixed sizes.

    Raises:
        InputError: naming the first two that differ.
    """
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if other[0] != shape[0]:
            raise InputError(
                f"{what}: '{first}' has {shape[0]} channels and '{name}' {other[0]}; {channels}."
            )
        if other != shape:
            raise InputError(
                f"{what}: '{first}' is {shape[1]}×{shape[2]} (height×width) and '{name}' "
                f"{other[1]}×{other[2]}; {size}."
            )


def check_at_least_1(options: dict[str, int | None]) -> None:
    """Raise InputError for the first option that is set below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
