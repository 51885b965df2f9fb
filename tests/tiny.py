"""Tiny networks, of ours and of diffusers."""

from typing import Any

import pytest
import torch
from torch import nn


def filled(network: nn.Module, std: float | None = None) -> nn.Module:
    """The network with all layers at work; without ``std``, by the number of their inputs."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        size = std or 0.5 * max(p[0].numel(), 1) ** -0.5
        nn.init.normal_(p, std=size, generator=generator)
    return network


def unet2d(attention: bool = True, outputs: int = 3, **options: Any) -> Any:
    """A network of diffusers of two levels, for 8×8 pixels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kind = "Attn" * attention
    own = {
        "sample_size": 8,
        "out_channels": outputs,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownBlock2D", f"{kind}DownBlock2D"),
        "up_block_types": (f"{kind}UpBlock2D", "UpBlock2D"),
        "add_attention": attention,
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    return diffusers.UNet2DModel(**(own | options))


def autoencoder(kind: str, **options: Any) -> Any:
    """An autoencoder of diffusers, of half as many rows."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    own = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        **({"num_vq_embeddings": 16} if kind == "VQModel" else {}),
    }
    return getattr(diffusers, kind)(**(own | options))
