"""Priors: pretrained networks, the U-Net of guided-diffusion's layout, and what wraps them."""

from cmi_lightning.denoisers.base import Autocast, Denoiser, Prediction
from cmi_lightning.denoisers.channels import AsGray, AsRGB
from cmi_lightning.denoisers.diffusers_models import DiffusersDenoiser
from cmi_lightning.denoisers.edm import EDMDenoiser
from cmi_lightning.denoisers.latent import Autoencoder, Decoder, LatentPrior
from cmi_lightning.denoisers.network import NetworkDenoiser
from cmi_lightning.denoisers.presets import card_unet, ffhq, imagenet, shipped_prior
from cmi_lightning.denoisers.tiled import Tiled
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import load_weights

__all__ = [
    "AsGray",
    "AsRGB",
    "Autocast",
    "Autoencoder",
    "Decoder",
    "Denoiser",
    "DiffusersDenoiser",
    "EDMDenoiser",
    "LatentPrior",
    "NetworkDenoiser",
    "Prediction",
    "Tiled",
    "UNet",
    "card_unet",
    "ffhq",
    "imagenet",
    "load_weights",
    "shipped_prior",
]
