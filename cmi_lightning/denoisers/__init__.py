"""Priors: pretrained networks, the U-Net of guided-diffusion's layout, and exact ones."""

from cmi_lightning.denoisers.base import Autocast, Denoiser, Prediction
from cmi_lightning.denoisers.channels import AsGray, AsRGB
from cmi_lightning.denoisers.covariance import (
    Covariance,
    DenseCovariance,
    DiagonalCovariance,
    StationaryCovariance,
)
from cmi_lightning.denoisers.mixture import (
    GaussianMixture,
    GaussianPrior,
    load_mixture,
    power_law_prior,
)
from cmi_lightning.denoisers.network import NetworkDenoiser, shipped_prior
from cmi_lightning.denoisers.presets import ffhq, ffhq_unet, imagenet, imagenet_unet
from cmi_lightning.denoisers.pretrained import DiffusersDenoiser, EDMDenoiser
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import PUBLISHED, load_weights

__all__ = [
    "PUBLISHED",
    "AsGray",
    "AsRGB",
    "Autocast",
    "Covariance",
    "Denoiser",
    "DenseCovariance",
    "DiagonalCovariance",
    "DiffusersDenoiser",
    "EDMDenoiser",
    "GaussianMixture",
    "GaussianPrior",
    "NetworkDenoiser",
    "Prediction",
    "StationaryCovariance",
    "UNet",
    "ffhq",
    "ffhq_unet",
    "imagenet",
    "imagenet_unet",
    "load_mixture",
    "load_weights",
    "power_law_prior",
    "shipped_prior",
]
