"""From images in [−1, 1] to PNG files and labelled grids; no stretching of contrast anywhere."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmi_lightning.data.pictures import levels, png
from cmi_lightning.files import write

MARGIN, HEADER, SMALLEST = 6, 22, 112  # pixels: gaps, heading, least longer side in a grid
PNG = b"\x89PNG\r\n\x1a\n"
NATIVE = (1, 3, 4)  # channel counts that a PNG holds: gray, RGB, RGBA


def planes(x: Tensor, bits: int = 8) -> list[np.ndarray]:
    """Return pixels (H, W) or (H, W, C) of one image x (C, H, W) in [−1, 1], whole numbers.

    One array for 1, 3 and 4 channels, else one for each channel.
    """
    kind = np.uint16 if bits == 16 else np.uint8
    pixels = levels(x, 2**bits - 1).nan_to_num(0.0).cpu().numpy().astype(kind)
    if len(pixels) in NATIVE and len(pixels) > 1:
        return [np.ascontiguousarray(pixels.transpose(1, 2, 0))]
    return list(pixels)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return whole numbers (H, W) or (H, W, 3 or 4) of 8 or 16 bits as a PNG file."""
    if pixels.dtype == np.uint8:
        return png(Image.fromarray(pixels))
    # Pillow writes 16 bits of gray only.
    height, width, *channels = pixels.shape
    colour = {(): 0, (3,): 2, (4,): 6}[tuple(channels)]
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    unfiltered = np.pad(rows, ((0, 0), (1, 0)))  # each row starts with the number of its filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    content = zlib.compress(unfiltered.tobytes())
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def to_tile(x: Tensor) -> Image.Image:
    """Return x (C, H, W) as one image for a grid; channels a PNG cannot hold lie side by side."""
    (pixels,) = planes(x if len(x) in NATIVE else torch.cat(list(x), dim=-1)[None])
    return Image.fromarray(pixels)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG that is either whole or absent, making its folders."""
    write(path, encode_png(np.asarray(image)))


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Join images of one size and mode side by side, to be kept in one file."""
    width, height = images[0].size
    joined = Image.new(images[0].mode, (width * len(images), height))
    for i, image in enumerate(images):
        joined.paste(image, (i * width, 0))
    return joined


def apart(path: Path, count: int) -> list[Image.Image]:
    """Read what :func:`beside` joined."""
    with Image.open(path) as joined:
        width = joined.width // count
        return [joined.crop((i * width, 0, (i + 1) * width, joined.height)) for i in range(count)]


def tile(rows: Sequence[Sequence[Image.Image]], headings: Sequence[str] = ()) -> Image.Image:
    """Lay images out in rows under column headings, all enlarged alike.

    Small ones are enlarged by a whole number without smoothing, so that every pixel stays visible;
    transparent ones lie on white.
    """
    width, height = map(max, zip(*(image.size for row in rows for image in row), strict=True))
    scale = max(1, -(-SMALLEST // max(width, height)))
    width, height = width * scale, height * scale
    top = HEADER if headings else MARGIN
    columns = max(map(len, rows))
    size = (MARGIN + columns * (width + MARGIN), top + len(rows) * (height + MARGIN))
    canvas = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sides = image.width * scale, image.height * scale
            enlarged = image.resize(sides, Image.Resampling.NEAREST)
            corner = (MARGIN + j * (width + MARGIN), top + i * (height + MARGIN))
            canvas.paste(enlarged, corner, enlarged if image.mode == "RGBA" else None)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for j, heading in enumerate(headings):
        center = MARGIN + j * (width + MARGIN) + width // 2
        draw.text((center, HEADER // 2), heading, "black", font, anchor="mm")
    return canvas
