"""Image files that Pillow does not write: any PNG, and colour profiles."""

import struct
import zlib

import numpy as np


def png(
    width: int, height: int, bits: int, kind: int, packed: bytes, key: bytes | None = None
) -> bytes:
    """A PNG of rows that are packed by zlib, each after a byte 0, with a transparent colour."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", packed), (b"IEND", b"")]
    chunks = [(k, d) for k, d in chunks if d is not None]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )


def png16(array: np.ndarray, key: int | None = None) -> bytes:
    """A PNG of 16 bits (H, W, 1, 3 or 4); ``key`` stands for transparency in all channels."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    height, width, channels = array.shape
    clear = None if key is None else struct.pack(">H", key) * channels
    return png(width, height, 16, {1: 0, 3: 2, 4: 6}[channels], zlib.compress(rows), clear)


def black_png(side: int) -> bytes:
    """A PNG of side×side black pixels, in about side²/8000 bytes."""
    packed = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    return png(side, side, 1, 0, data)


def icc(gamma: float, swap: bool = False, gray: bool = False) -> bytes:
    """A colour profile of sRGB's primaries (or red and green swapped, or gray) and a power."""

    def xyz(*numbers: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)

    white, curve = (0.9642, 1.0, 0.8249), struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    red, green = (green, red) if swap else (red, green)
    tags = {b"wtpt": xyz(*white), b"kTRC": curve}
    if not gray:
        tags = {b"wtpt": xyz(*white), b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(">I4xI", start + len(data), 0x02100000) + b"mntr"
    header += (b"GRAY" if gray else b"RGB ") + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    return header + xyz(*white)[8:] + bytes(48) + table + data
