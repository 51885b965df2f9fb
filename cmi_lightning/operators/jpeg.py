"""Compression by JPEG, differentiable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cmi_lightning.checked import number
from cmi_lightning.errors import InputError
from cmi_lightning.operators.base import Operator
from cmi_lightning.operators.nonlinear import straight_through

# Tables K.1 and K.2 of ITU-T T.81.
LUMINANCE = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101
72 92 95 98 112 100 103 99
"""
CHROMINANCE = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99
"""
TO_YCC = (  # JFIF
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


@dataclass(frozen=True)
class JPEG(Operator):
    """y = the image decoded from a JPEG file of x, in 8 bits.

    Colours become YCbCr (JFIF), and chroma is averaged over 2×2 pixels. The cosine transform of
    each block of 8×8 pixels is rounded to multiples of the tables of Annex K, scaled as libjpeg
    scales them. Rounding and clipping have the gradient of what is rounded ("straight through").
    The border is repeated to whole blocks. A gray image has one table; alpha is kept as it is.

    >>> x = torch.zeros(1, 3, 9, 9)
    >>> bool((JPEG(90)(x) - x).abs().max() < 0.01)
    True

    Args:
        quality: 1 to 100, as Pillow and libjpeg have it.
        subsampling: average chroma over 2×2 pixels (4:2:0), as is usual below quality 95.

    Source: ITU-T T.81 (1992); Kawar et al. (2022b), who drop every second chroma pixel instead.
    """

    quality: int = number(10, "[1, 100]")
    subsampling: bool = True

    def table(self, numbers: str) -> Tensor:
        """Return a quantisation table (8, 8), float64."""
        scale = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        base = torch.tensor([int(n) for n in numbers.split()]).reshape(8, 8)
        return ((base * scale + 50) // 100).clamp(1, 255).double()

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        if channels not in (1, 3, 4):
            raise InputError(f"JPEG takes images of 1, 3 or 4 channels, not {channels}.")
        light = (x[:, :3] + 1) * 127.5 - 128
        if channels == 1:
            decoded = self._coded(light, LUMINANCE)
        else:
            to_ycc, to_rgb = _constants(self, x.device, x.dtype)[1]
            ycc = torch.einsum("kc,bchw->bkhw", to_ycc, light + 128)
            luma, chroma = ycc[:, :1] - 128, ycc[:, 1:]
            height, width = x.shape[2:]
            if self.subsampling:
                chroma = F.pad(chroma, (0, width % 2, 0, height % 2), mode="replicate")
                chroma = F.avg_pool2d(chroma, 2)
            chroma = self._coded(chroma, CHROMINANCE)
            if self.subsampling:
                chroma = chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
            luma = self._coded(luma, LUMINANCE) + 128
            ycc = torch.cat([luma, chroma[..., :height, :width]], 1)
            decoded = torch.einsum("kc,bchw->bkhw", to_rgb, ycc) - 128
        pixels = decoded + 128
        y = straight_through(pixels.round().clamp(0, 255), pixels) / 127.5 - 1
        return torch.cat([y, x[:, 3:]], 1) if channels == 4 else y

    def guess(self, y: Tensor) -> Tensor:
        return y

    def _coded(self, planes: Tensor, numbers: str) -> Tensor:
        """Return planes (B, K, H, W) of numbers about 0 after rounding their coefficients."""
        height, width = planes.shape[2:]
        padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
        blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)
        C, tables = _constants(self, planes.device, planes.dtype)[0]
        table = tables[numbers]
        levels = C @ blocks @ C.T / table
        blocks = C.T @ (straight_through(levels.round(), levels) * table) @ C
        rows, columns = blocks.shape[2:4]
        image = blocks.transpose(3, 4).reshape(*planes.shape[:2], 8 * rows, 8 * columns)
        return image[..., :height, :width]


Constants = tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]


@lru_cache
def _constants(jpeg: JPEG, device: torch.device, dtype: torch.dtype) -> Constants:
    """Return (the cosine transform, the tables), (RGB to YCbCr, back), once for each device."""
    with torch.inference_mode(False):
        matrix = torch.tensor(TO_YCC, dtype=dtype, device=device)
        tables = {numbers: jpeg.table(numbers) for numbers in (LUMINANCE, CHROMINANCE)}
        there = {numbers: table.to(device, dtype) for numbers, table in tables.items()}
        return (_cosines().to(device, dtype), there), (matrix, torch.linalg.inv(matrix))


def _cosines() -> Tensor:
    """Return the orthonormal DCT-II of 8 points, (8, 8), float64."""
    k = torch.arange(8, dtype=torch.float64)
    C = torch.cos(math.pi * k[:, None] * (2 * k + 1) / 16) / 2
    C[0] /= math.sqrt(2)
    return C
