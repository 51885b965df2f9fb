"""The U-Net of guided-diffusion's layout, written so that every derivative of it is right.

State-dict names and shapes are those of Dhariwal & Nichol (2021), so the public FFHQ and ImageNet
checkpoints fit. Two things differ from the published code on purpose. Attention is plain tensor
algebra, not a custom autograd function that drops or refuses second derivatives; and checkpointing,
on request, saves memory in second derivatives too, see
:class:`cmi_lightning.denoisers.recompute.Recomputed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmi_lightning.checked import check_arguments
from cmi_lightning.denoisers.blocks import (
    AttentionBlock,
    GroupNorm32,
    ResBlock,
    TimedSequential,
    joined,
    timestep_embedding,
)
from cmi_lightning.denoisers.recompute import run_leanly, run_plainly
from cmi_lightning.errors import InputError


class UNet(nn.Module):
    """ε_θ(x_t, t), optionally with the variance fraction v as further output channels.

    Args:
        in_channels: channels C of the image.
        model_channels: width of the first level; a multiple of 32.
        channel_mult: width of each level relative to the first; every level halves the size.
        num_res_blocks: residual blocks per level.
        attention_levels: levels (0 = full size) that carry self-attention.
        num_head_channels: channels per attention head.
        learn_variance: output 2C channels (ε, v) instead of C.
        dropout: dropout inside residual blocks, in training only.
        scale_shift: the time embedding scales and shifts features (else it is added to them).
        checkpoint: keep less for derivatives, and recompute it: of a frozen network in evaluation
            mode all but the inputs of norms and attention, in training whole blocks. FFHQ's network
            so needs half the memory for Jᵀu, and 40 % for its derivative, at a tenth more time.
        fused_attention: use PyTorch's fused attention. It has no second derivative, so CMI by
            autograd needs the default, plain attention.
        patch_size: the network sees patches of p×p pixels as channels (pixel-unshuffle), which
            costs p² times less. Published checkpoints have 1.
        middle_attention: self-attention between the halves, as published checkpoints have it.
            Without any attention the network is a convolution and serves images of every size.
        num_classes: classes that the network is told, as ``y`` (B,), integers below it.
        num_heads: heads of every attention, instead of width // ``num_head_channels``.
        new_attention_order: see :class:`cmi_lightning.denoisers.blocks.AttentionBlock`.

    References:
        Dhariwal & Nichol (2021), Diffusion models beat GANs on image synthesis.

    >>> network = UNet(3, 32, (1, 2), attention_levels=(), patch_size=2, middle_attention=False)
    >>> network.size_multiple, network(torch.zeros(1, 3, 12, 20), torch.tensor([500.0])).shape
    (4, torch.Size([1, 3, 12, 20]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 1,
        attention_levels: Sequence[int] = (4,),
        num_head_channels: int = 64,
        learn_variance: bool = False,
        dropout: float = 0.0,
        scale_shift: bool = True,
        checkpoint: bool = False,
        fused_attention: bool = False,
        patch_size: int = 1,
        middle_attention: bool = True,
        num_classes: int | None = None,
        num_heads: int | None = None,
        new_attention_order: bool = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        #: The constructor's arguments, as JSON can hold them.
        self.config = {k: list(v) if isinstance(v, Sequence) else v for k, v in options.items()}
        self.num_classes = num_classes
        intervals = dict.fromkeys(options, "[1, inf)")
        intervals |= {"attention_levels": "[0, inf)", "dropout": "[0, 1]"}
        check_arguments(UNet.__init__, options, **intervals)
        if model_channels % 32:
            raise InputError(f"UNet.model_channels must be a multiple of 32, got {model_channels}.")
        if not channel_mult:
            raise InputError("UNet.channel_mult must not be empty.")
        self.in_channels, self.model_channels = in_channels, model_channels
        self.learn_variance, self.checkpoint = learn_variance, checkpoint
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (len(channel_mult) - 1)
        self.derivatives = 1 if fused_attention else 2
        embed_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embed_dim)

        def residual(width_in: int, width: int, resample: str | None = None) -> ResBlock:
            return ResBlock(width_in, embed_dim, width, dropout, resample, scale_shift)

        def attention(width: int) -> AttentionBlock:
            heads = num_heads or max(1, width // num_head_channels)
            if width % heads:
                raise InputError(f"{heads} heads do not divide {width} channels; set num_heads.")
            return AttentionBlock(width, heads, fused_attention, new_attention_order)

        width = channel_mult[0] * model_channels
        self.input_blocks = nn.ModuleList(
            [TimedSequential(nn.Conv2d(in_channels * patch_size**2, width, 3, padding=1))]
        )
        skips = [width]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [residual(width, mult * model_channels)]
                width = mult * model_channels
                if level in attention_levels:
                    layers.append(attention(width))
                self.input_blocks.append(TimedSequential(*layers))
                skips.append(width)
            if level + 1 < len(channel_mult):
                self.input_blocks.append(TimedSequential(residual(width, width, "down")))
                skips.append(width)
        between = [attention(width)] if middle_attention else []
        self.middle_block = TimedSequential(
            residual(width, width), *between, residual(width, width)
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [residual(width + skips.pop(), mult * model_channels)]
                width = mult * model_channels
                if level in attention_levels:
                    layers.append(attention(width))
                if level and i == num_res_blocks:
                    layers.append(residual(width, width, "up"))
                self.output_blocks.append(TimedSequential(*layers))
        out_channels = in_channels * patch_size**2 * (2 if learn_variance else 1)
        last = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), last)

    def forward(self, x: Tensor, times: Tensor, y: Tensor | None = None) -> Tensor:
        """Map x_t (B, C, H, W), the original time indices (B,) and classes (B,) to ε or (ε, v).

        Raises:
            InputError: if the image size is not a multiple of the network's total downsampling, or
                classes are given to a network without, or the reverse.
        """
        if (y is None) != (self.num_classes is None):
            raise InputError(
                f"The network has num_classes={self.num_classes}: give classes y to a network that "
                "has some, and only to one."
            )
        if any(n % self.size_multiple for n in x.shape[-2:]):
            raise InputError(
                f"The network shrinks the image {self.size_multiple} times, so its sides must be "
                f"multiples of {self.size_multiple}; got {tuple(x.shape[-2:])}."
            )
        features = timestep_embedding(times, self.model_channels)
        dtype = next(self.parameters()).dtype
        embedding = self.time_embed(features.to(dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y)

        saving = self.checkpoint and torch.is_grad_enabled()
        training = self.training or any(p.requires_grad for p in self.parameters())
        lean = saving and not training
        run = run_leanly if lean else run_plainly

        def through(block: nn.Module, *parts: Tensor) -> Tensor:
            if not lean:
                parts = (joined(parts),)  # once; kept apart they take less where they are kept
            if saving and training:
                return checkpoint(block, embedding, *parts, use_reentrant=False)
            return block(embedding, *parts, run=run)

        # The first convolution sees x_t in full precision: bfloat16 resolves 1 to 0.008, no finer
        # than the noise of the last levels.
        device = x.device.type.replace("meta", "cpu")  # shapes alone: autocast knows no meta
        with torch.autocast(device, enabled=False):
            patches = F.pixel_unshuffle(x.to(dtype), self.patch_size)
            h = self.input_blocks[0](embedding, patches, run=run)
        if torch.is_autocast_enabled(device):
            h = h.to(torch.get_autocast_dtype(device))
        skips = [h]
        for block in self.input_blocks[1:]:
            h = through(block, h)
            skips.append(h)
        h = through(self.middle_block, h)
        for block in self.output_blocks:
            h = through(block, h, skips.pop())
        norm, activation, convolve = self.out
        out = run(convolve, run(lambda h: activation(norm(h)), h))
        return F.pixel_shuffle(out, self.patch_size)
