"""Guidances: CMI, and the base methods it composes with."""

from cmi_lightning.guidance.base import Guidance, residual_gradient
from cmi_lightning.guidance.cmi import CMI
from cmi_lightning.guidance.ddnm import DDNM
from cmi_lightning.guidance.dps import DPS
from cmi_lightning.guidance.dsg import DSG
from cmi_lightning.guidance.mcg import MCG
from cmi_lightning.guidance.moment_matching import MomentMatching
from cmi_lightning.guidance.pigdm import PiGDM

__all__ = [
    "CMI",
    "DDNM",
    "DPS",
    "DSG",
    "MCG",
    "Guidance",
    "MomentMatching",
    "PiGDM",
    "residual_gradient",
]
