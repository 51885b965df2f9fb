"""The networks of the published FFHQ and ImageNet checkpoints, by name.

Their layout and their state dicts' names and shapes are guided-diffusion's (Dhariwal & Nichol,
2021): with the weights of DPS (Chung et al., 2023), ``ffhq_10m.pt``, and of guided-diffusion,
``256x256_diffusion_uncond.pt`` (which DPS calls ``imagenet256.pt``), they fit without renaming.
"""

from __future__ import annotations

from cmi_lightning.denoisers.unet import UNet


def ffhq_unet(checkpoint: bool = False, fused_attention: bool = False) -> UNet:
    """Return the network of ``ffhq_10m.pt``: 256x256 faces, 93,563,910 parameters, 362 tensors.

    Args:
        checkpoint: recompute blocks in the backward pass to save memory, see :class:`UNet`.
        fused_attention: faster attention without second derivatives, see :class:`UNet`.
    """
    return UNet(
        model_channels=128,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=1,
        attention_levels=(4,),
        learn_variance=True,
        checkpoint=checkpoint,
        fused_attention=fused_attention,
    )


def imagenet_unet(checkpoint: bool = False, fused_attention: bool = False) -> UNet:
    """Return the network of ``256x256_diffusion_uncond.pt``: 552,814,086 parameters, 566 tensors.

    Args:
        checkpoint: recompute blocks in the backward pass to save memory, see :class:`UNet`.
        fused_attention: faster attention without second derivatives, see :class:`UNet`.
    """
    return UNet(
        model_channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_levels=(3, 4, 5),
        learn_variance=True,
        checkpoint=checkpoint,
        fused_attention=fused_attention,
    )
