"""Image files as tensors in [−1, 1], with every complaint made before any sampling."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageOps
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.paths import printable

T = TypeVar("T")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
Channels = Literal[1, 3, 4]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Only these decoders: among Pillow's others are ones that start programs, whatever the suffix.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 1024**3 // 12  # Pillow's default limit of an image, for images made here as well
NUM_REPORTED = 5


class UnreadableError(InputError):
    """A single file that no option can make readable; ``data.strict`` says what to do about it."""


def local_path(given: str, option: str) -> Path:
    """Return the path of an option, with ``~`` resolved.

    Raises:
        InputError: if there can be no such path on this machine.
    """
    try:
        path = Path(given).expanduser()
        path.is_dir()  # asks the system, which refuses some names
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option}: '{printable(given)}' is no path here ({reason}).") from error
    return path


def find_images(folder: Path, option: str) -> dict[str, Path]:
    """Return {id: file} of a folder and its subfolders in natural order ("2" before "10").

    An id is the path relative to the folder, with slashes and without suffix, as
    :func:`printable` gives it. Hidden files and folders are passed over. A file may be a symbolic
    link to anywhere; folders that are links are not entered.

    Raises:
        InputError: if the folder is missing or holds no image, or two files share an id.
    """
    if not folder.is_dir():
        raise InputError(
            f"{option}: there is no folder '{printable(folder)}'; give a folder with image files."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        dangling = path.is_symlink() and not path.exists()  # an image that cannot be read
        if hidden or path.suffix.lower() not in SUFFIXES or not (path.is_file() or dangling):
            continue
        name = printable(relative.with_suffix("").as_posix())
        if name in found:
            raise InputError(
                f"{option}: '{printable(found[name])}' and '{printable(path)}' would share the id "
                f"'{name}'; rename one."
            )
        found[name] = path
    if not found:
        raise InputError(
            f"{option}: the folder '{printable(folder)}' holds no image ({', '.join(SUFFIXES)}); "
            "give a folder that does."
        )
    return {name: found[name] for name in sorted(found, key=natural)}


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names with numbers as people do: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def read_image(path: Path, channels: Channels | None, option: str) -> Tensor:
    """Decode a whole file to (C, H, W) float32 in [−1, 1], turned upright as its EXIF tag says.

    8-bit values are divided by 255 and 16-bit gray ones by 65535; Pillow reads 16-bit colour with 8
    bits. Of several pictures in a file the first is read.

    Args:
        path: the file.
        channels: 1, 3 or 4 to convert to gray, RGB or RGBA; None for the file's own.
        option: name of the option that sets ``channels``, for messages.

    Raises:
        UnreadableError: if the file cannot be decoded, has more pixels than Pillow's limit against
            decompression bombs, or 32-bit pixels.
        InputError: if it holds pixels of a kind that is not supported and ``channels`` is None.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of metadata; what is unreadable raises
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
            if channels is not None and image.mode not in ("I", "F") and image.mode[:4] != "I;16":
                image = image.convert(MODES[channels])
            elif image.mode == "1":
                image = image.convert("L")
            elif image.mode == "P":
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(
            f"The image '{printable(path)}' has more pixels than Pillow's limit of "
            f"{Image.MAX_IMAGE_PIXELS} against decompression bombs; shrink or remove it."
        ) from error
    except Exception as error:  # Pillow's decoders raise all kinds
        reason = printable(" ".join(str(error).split()))
        raise UnreadableError(
            f"Cannot read the image '{printable(path)}' ({type(error).__name__}: {reason}); repair "
            "or remove it."
        ) from error
    if image.mode.startswith("I;16"):
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 32767.5 - 1)[None]
        if channels in (3, 4):
            opaque = torch.ones_like(pixels)
            pixels = torch.cat([pixels] * 3 + [opaque] * (channels - 3))
        return pixels
    if image.mode in ("I", "F"):
        raise UnreadableError(
            f"'{printable(path)}' has 32-bit pixels (kind {image.mode}), whose range is unknown; "
            "save it with 8 or 16 bits."
        )
    if image.mode not in MODES.values():
        raise InputError(
            f"'{printable(path)}' has pixels of kind {image.mode}; set {option} to 1, 3 or 4 to "
            "convert it."
        )
    array = np.array(image)  # a copy: torch wants to own writable memory
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array).float() / 127.5 - 1


def read_all(
    files: Iterable[tuple[str, Path]], read: Callable[[str, Path], T], strict: bool, option: str
) -> tuple[dict[str, T], dict[str, str]]:
    """Read every file, and return {id: what was read} and {file: why it was not}.

    Args:
        files: ids and files.
        read: called with each of them.
        strict: refuse the first unreadable file instead of leaving it out.
        option: the option that names the folder, for the message.

    Raises:
        UnreadableError: with ``strict``, for the first unreadable file.
        InputError: if none is readable.
    """
    found: dict[str, T] = {}
    skipped: dict[str, str] = {}
    for name, path in files:
        try:
            found[name] = read(name, path)
        except UnreadableError as error:
            if strict:
                raise
            skipped[printable(path)] = str(error)
    if not found:
        count = f"none of {len(skipped)} images can be read. " if len(skipped) > 1 else ""
        raise InputError(f"{option}: {count}{next(iter(skipped.values()))}")
    return found, skipped


@rank_zero_only
def report_skipped(skipped: dict[str, str], left: int) -> None:
    """Print why files were left out: the first five, and how many there are."""
    lines = [f"skipped: {reason}" for reason in list(skipped.values())[:NUM_REPORTED]]
    lines.append(
        f"skipped {len(skipped)} of {len(skipped) + left} images, which cannot be read "
        "(data.strict=true refuses them)"
    )
    print("\n".join(lines), file=sys.stderr)


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
    _check_at_least(1, options)


def check_num_workers(value: int) -> None:
    """Raise InputError if ``data.num_workers`` is negative."""
    _check_at_least(0, {"data.num_workers": value})


def _check_at_least(least: int, options: dict[str, int | None]) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")


def check_pixels(height: int, width: int, what: str, remedy: str) -> None:
    """Raise InputError if an image to be made would have more pixels than Pillow lets one have."""
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{what} would make images of {height}×{width} (height×width), more than {MAX_PIXELS} "
            f"pixels; {remedy}."
        )
