"""Priors: pretrained networks, the U-Net of guided-diffusion's layout, and exact ones."""

from cmi_lightning.denoisers.base import Autocast, Denoiser, Prediction
from cmi_lightning.denoisers.mixture import GaussianMixture
from cmi_lightning.denoisers.network import NetworkDenoiser, load_weights, shipped_prior
from cmi_lightning.denoisers.unet import UNet

__all__ = [
    "Autocast",
    "Denoiser",
    "GaussianMixture",
    "NetworkDenoiser",
    "Prediction",
    "UNet",
    "load_weights",
    "shipped_prior",
]
