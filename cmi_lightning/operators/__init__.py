"""Linear operators A of y = A x₀ + n: images in, measurements out."""

from cmi_lightning.operators.base import LinearOperator, Operator
from cmi_lightning.operators.blur import Convolution, MotionBlur
from cmi_lightning.operators.dense import Dense
from cmi_lightning.operators.mask import BoxMask, Identity, PixelMask, RandomMask
from cmi_lightning.operators.separable import Downsample, GaussianBlur, Separable

__all__ = [
    "BoxMask",
    "Convolution",
    "Dense",
    "Downsample",
    "GaussianBlur",
    "Identity",
    "LinearOperator",
    "MotionBlur",
    "Operator",
    "PixelMask",
    "RandomMask",
    "Separable",
]
