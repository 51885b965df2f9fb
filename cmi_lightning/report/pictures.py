"""The images that the report embeds: PNG files inside its folder, as data URIs."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 128  # pixels: images up to this size are enlarged without smoothing


@dataclass(frozen=True)
class Picture:
    """An embedded image: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen as such."""
        return max(self.width, self.height) <= SMALL


def read_picture(folder: Path, path: Any) -> Picture | None:
    """Return an image, or None where there is none to read.

    Args:
        folder: the report's; no file outside it is read.
        path: where the results say that the image is, relative to the folder.
    """
    if not isinstance(path, str) or not path:
        return None
    try:
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()):
            return None
        data = file.read_bytes()
    except (OSError, ValueError):
        return None
    if not data.startswith(PNG) or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)
