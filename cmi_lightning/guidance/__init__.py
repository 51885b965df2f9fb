"""Guidances: CMI, and the methods it composes with."""

from cmi_lightning.guidance.annealed import AnnealedDPS
from cmi_lightning.guidance.base import Guidance, residual_gradient
from cmi_lightning.guidance.cadps import CADPS
from cmi_lightning.guidance.cdps import CDPS
from cmi_lightning.guidance.cmi import CMI
from cmi_lightning.guidance.ddnm import DDNM
from cmi_lightning.guidance.diffpir import DiffPIR
from cmi_lightning.guidance.discrepancy import Discrepancy
from cmi_lightning.guidance.dmps import DMPS
from cmi_lightning.guidance.dps import DPS
from cmi_lightning.guidance.dsg import DSG
from cmi_lightning.guidance.lamp import LAMP
from cmi_lightning.guidance.lle import LLE
from cmi_lightning.guidance.lle_training import LLETraining
from cmi_lightning.guidance.mcg import MCG
from cmi_lightning.guidance.moment_matching import MomentMatching
from cmi_lightning.guidance.pigdm import PiGDM
from cmi_lightning.guidance.psld import PSLD
from cmi_lightning.guidance.resample import ReSample
from cmi_lightning.guidance.sitcom import SITCOM
from cmi_lightning.guidance.tmpd import TMPD

__all__ = [
    "CADPS",
    "CDPS",
    "CMI",
    "DDNM",
    "DMPS",
    "DPS",
    "DSG",
    "LAMP",
    "LLE",
    "MCG",
    "PSLD",
    "SITCOM",
    "TMPD",
    "AnnealedDPS",
    "DiffPIR",
    "Discrepancy",
    "Guidance",
    "LLETraining",
    "MomentMatching",
    "PiGDM",
    "ReSample",
    "residual_gradient",
]
