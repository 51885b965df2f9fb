"""The published FFHQ and ImageNet priors at 256×256, by name.

State-dict names and shapes are those of guided-diffusion (Dhariwal & Nichol, 2021), so that the
files published by DPS (Chung et al., 2023), ``ffhq_10m.pt``, and by guided-diffusion,
``256x256_diffusion_uncond.pt`` (DPS calls it ``imagenet256.pt``), fit as they are. Both networks
predict ε on the linear chain of 1,000 steps and learn the variance.
"""

from __future__ import annotations

from cmi_lightning.denoisers.network import NetworkDenoiser
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import find_weights


def ffhq(
    weights: str = "ffhq_10m.pt",
    checkpoint: bool = True,
    fused_attention: bool = False,
    sha256: str | None = None,
) -> NetworkDenoiser:
    """Return the prior of 256×256 faces, with the network :func:`ffhq_unet`.

    Args:
        weights: the published file, ``ffhq_10m.pt``; see :class:`NetworkDenoiser`.
        checkpoint: half the memory for a tenth more time, see :class:`UNet`.
        fused_attention: faster attention without second derivatives, see :class:`UNet`.
        sha256: checksum of the file; that of the published one is in :data:`PUBLISHED`.

    Raises:
        InputError: if the weights are missing, unreadable or do not fit.
    """
    find_weights(weights, expected="ffhq_10m.pt")  # before the network is made
    network = ffhq_unet(checkpoint, fused_attention)
    return NetworkDenoiser(network, weights, image_shape=(3, 256, 256), sha256=sha256)


def imagenet(
    weights: str = "256x256_diffusion_uncond.pt",
    checkpoint: bool = True,
    fused_attention: bool = False,
    sha256: str | None = None,
) -> NetworkDenoiser:
    """Return the unconditional prior of ImageNet at 256×256, with :func:`imagenet_unet`.

    Args:
        weights: the published file, ``256x256_diffusion_uncond.pt``; see :class:`NetworkDenoiser`.
        checkpoint: half the memory for a tenth more time, see :class:`UNet`.
        fused_attention: faster attention without second derivatives, see :class:`UNet`.
        sha256: checksum of the file; that of the published one is in :data:`PUBLISHED`.

    Raises:
        InputError: if the weights are missing, unreadable or do not fit.
    """
    find_weights(weights, expected="256x256_diffusion_uncond.pt")  # before the network is made
    network = imagenet_unet(checkpoint, fused_attention)
    return NetworkDenoiser(network, weights, image_shape=(3, 256, 256), sha256=sha256)


def ffhq_unet(checkpoint: bool = False, fused_attention: bool = False) -> UNet:
    """Return that of ``ffhq_10m.pt``: 93,563,910 parameters in 362 tensors."""
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
    """Return that of ``256x256_diffusion_uncond.pt``: 552,814,086 parameters in 566 tensors."""
    return UNet(
        model_channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_levels=(3, 4, 5),
        learn_variance=True,
        checkpoint=checkpoint,
        fused_attention=fused_attention,
    )
