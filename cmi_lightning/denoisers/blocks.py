"""Layers of guided-diffusion's U-Net, in its state-dict names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmi_lightning.denoisers.recompute import Runner, run_plainly


class GroupNorm32(nn.GroupNorm):
    """Group normalisation over 32 groups whose statistics are taken in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, *) and return it in the dtype it came in."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # The CPU kernel takes bfloat16 with float32 weights and accumulates in float32.
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_wide, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(x_wide, self.num_groups, weight, bias, self.eps).to(x.dtype)


def timestep_embedding(times: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (B, dim) of times (B,): cosines first, periods from 2π to 2π·10⁴."""
    half = dim // 2
    exponents = torch.arange(half, device=times.device, dtype=torch.float32) / half
    angles = times.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the concatenation of features (B, C, H, W) along C."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a time-dependent scale and shift, and a skip around them."""

    def __init__(
        self,
        channels: int,
        embed_dim: int,
        out_channels: int,
        dropout: float = 0.0,
        resample: str | None = None,
        scale_shift: bool = True,
    ) -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        width = 2 * out_channels if scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, width))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(dropout), last
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def _before(self, *parts: Tensor) -> Tensor:
        norm, activation, _ = self.in_layers
        return self._resampled(activation(norm(joined(parts))))

    def _between(self, h: Tensor, e: Tensor) -> Tensor:
        norm, activation, dropout, _ = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            return dropout(activation(norm(h) * (1 + scale) + shift))
        return dropout(activation(norm(h + e)))

    def forward(self, embedding: Tensor, *parts: Tensor, run: Runner = run_plainly) -> Tensor:
        """Map a time embedding (B, E) and features (B, C, H, W), in parts, to the new width."""
        # First, so that the backward pass, which runs in reverse, comes to its gradient last.
        skip = run(self.skip_connection, self._resampled(joined(parts)))
        h = run(self.in_layers[-1], run(self._before, *parts))
        e = self.emb_layers(embedding).to(h.dtype)[..., None, None]
        return skip + run(self.out_layers[-1], run(self._between, h, e))


class AttentionBlock(nn.Module):
    """Self-attention over pixels: channels are heads of (q, k, v), or with ``new_order`` q, k, v.

    Published checkpoints have the first order ("legacy"), that of ImageNet 64×64 the new one.
    """

    def __init__(
        self, channels: int, num_heads: int, fused: bool = False, new_order: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.channels = "(three n c)" if new_order else "(n three c)"
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, f"b {self.channels} l -> three b n l c", n=self.num_heads, three=3)
        if self.fused:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = q.shape[-1] ** -0.25  # on q and on k: steadier in low precision than on q·k
            logits = (q * scale) @ (k * scale).transpose(-1, -2)
            wide = torch.promote_types(logits.dtype, torch.float32)
            h = torch.softmax(logits, dim=-1, dtype=wide).to(v.dtype) @ v
        return rearrange(h, "b n l c -> b (n c) l")

    def forward(self, x: Tensor, run: Runner = run_plainly) -> Tensor:
        """Map (B, C, H, W) to the same shape; softmax in float32 at least."""
        flat = rearrange(x, "b c h w -> b c (h w)")
        h = run(self._attend, run(self.qkv, run(self.norm, flat)))
        return (flat + run(self.proj_out, h)).reshape(x.shape)


class TimedSequential(nn.Sequential):
    """A sequence whose residual blocks also receive the time embedding."""

    def forward(  # type: ignore[override]
        self, embedding: Tensor, *parts: Tensor, run: Runner = run_plainly
    ) -> Tensor:
        """Apply the layers in order to features (B, C, H, W), given in parts."""
        for layer in self:
            if isinstance(layer, ResBlock):
                parts = (layer(embedding, *parts, run=run),)
            elif isinstance(layer, AttentionBlock):
                parts = (layer(*parts, run=run),)
            else:
                parts = (run(layer, *parts),)
        return parts[0]
