"""Forward models A of y = A(x₀) + n: images in, measurements out."""

from cmi_lightning.operators.adapters import from_deepinv, from_functions
from cmi_lightning.operators.base import LinearOperator, Operator
from cmi_lightning.operators.blur import Convolution, MotionBlur
from cmi_lightning.operators.channels import ChannelMix, Colorize, Demosaic
from cmi_lightning.operators.dense import Dense
from cmi_lightning.operators.downsampling import AveragePool, Downsample
from cmi_lightning.operators.jpeg import JPEG
from cmi_lightning.operators.kernels import GivenKernel, VaryingBlur
from cmi_lightning.operators.mask import BoxMask, Identity, Inpaint, PixelMask, RandomMask
from cmi_lightning.operators.nonlinear import (
    HDR,
    Gamma,
    NonlinearBlur,
    PhaseRetrieval,
    Quantize,
)
from cmi_lightning.operators.separable import GaussianBlur, Separable

__all__ = [
    "HDR",
    "JPEG",
    "AveragePool",
    "BoxMask",
    "ChannelMix",
    "Colorize",
    "Convolution",
    "Demosaic",
    "Dense",
    "Downsample",
    "Gamma",
    "GaussianBlur",
    "GivenKernel",
    "Identity",
    "Inpaint",
    "LinearOperator",
    "MotionBlur",
    "NonlinearBlur",
    "Operator",
    "PhaseRetrieval",
    "PixelMask",
    "Quantize",
    "RandomMask",
    "Separable",
    "VaryingBlur",
    "from_deepinv",
    "from_functions",
]
