"""Priors of the zoo's cards that are networks of our own: the shipped ones, FFHQ and ImageNet.

State-dict names and shapes are those of guided-diffusion (Dhariwal & Nichol, 2021), so that the
files published by DPS (Chung et al., 2023), ``ffhq_10m.pt``, and by guided-diffusion,
``256x256_diffusion_uncond.pt`` (DPS calls it ``imagenet256.pt``), fit as they are. Both networks
predict ε on the linear chain of 1,000 steps and learn the variance.
"""

from __future__ import annotations

from typing import Any, Literal

from cmi_lightning.denoisers.network import NetworkDenoiser
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import find_weights
from cmi_lightning.errors import InputError
from cmi_lightning.zoo.cards import card, shipped


def shipped_prior(
    name: Literal["fashion-mnist", "photos-64"] = "photos-64",
) -> NetworkDenoiser:
    """Return a prior that ships with the package.

    Args:
        name: "photos-64" (colour photographs, trained on 64×64; sides that are multiples of 8), or
            "fashion-mnist" (gray garments, 32×32).

    Raises:
        InputError: for another name.

    >>> shipped_prior("fashion-mnist").image_shape
    (1, 32, 32)
    """
    if name not in shipped():
        raise InputError(f"There is no shipped prior '{name}': use {', '.join(shipped())}.")
    return unet_prior(name, name)


def ffhq(
    weights: str = "ffhq_10m.pt",
    checkpoint: bool = True,
    fused_attention: bool = False,
    sha256: str | None = None,
) -> NetworkDenoiser:
    """Return the prior of 256×256 faces.

    Args:
        weights: the published file, ``ffhq_10m.pt``; see :class:`NetworkDenoiser`.
        checkpoint: half the memory for a tenth more time, see :class:`UNet`.
        fused_attention: faster attention without second derivatives, see :class:`UNet`.
        sha256: checksum of the file; its card has that of the published one.

    Raises:
        InputError: if the weights are missing, unreadable or do not fit.
    """
    return unet_prior("ffhq-256", weights, checkpoint, fused_attention, sha256)


def imagenet(
    weights: str = "256x256_diffusion_uncond.pt",
    checkpoint: bool = True,
    fused_attention: bool = False,
    sha256: str | None = None,
) -> NetworkDenoiser:
    """Return the unconditional prior of ImageNet at 256×256; arguments as in :func:`ffhq`."""
    return unet_prior("imagenet-256", weights, checkpoint, fused_attention, sha256)


def card_unet(name: str, checkpoint: bool = False, fused_attention: bool = False) -> UNet:
    """Return the network of a card, without its weights.

    "ffhq-256" has 93,563,910 parameters in 362 tensors, "imagenet-256" 552,814,086 in 566.
    """
    options = {k: v for k, v in card(name).network.items() if k != "class"}
    return UNet(**options, checkpoint=checkpoint, fused_attention=fused_attention)


def unet_prior(
    name: str,
    weights: str,
    checkpoint: bool = False,
    fused_attention: bool = False,
    sha256: str | None = None,
    **options: Any,
) -> NetworkDenoiser:
    """Return the prior of a card whose network is a :class:`UNet`, as :func:`ffhq`.

    ``options`` are further arguments of :class:`NetworkDenoiser`.
    """
    known = card(name)
    expected = known.file.name if known.file else None
    find_weights(weights, expected=expected)  # before the network is made
    prior = NetworkDenoiser(
        card_unet(name, checkpoint, fused_attention),
        weights,
        known.schedule,  # type: ignore[arg-type]
        known.prediction,  # type: ignore[arg-type]
        known.image_shape,  # type: ignore[arg-type]
        sha256=sha256,
        **options,
    )
    prior.trained_side = known.trained_side
    return prior
