"""Solvers of the reverse diffusion, and methods that are one."""

from cmi_lightning.solvers.ancestral import DDIM, DDPM
from cmi_lightning.solvers.base import Solver
from cmi_lightning.solvers.daps import DAPS
from cmi_lightning.solvers.ddnm import DDNMPlus
from cmi_lightning.solvers.ddrm import DDRM
from cmi_lightning.solvers.euler import Euler
from cmi_lightning.solvers.fps import FPS
from cmi_lightning.solvers.heun import Heun
from cmi_lightning.solvers.multistep import DPMSolver
from cmi_lightning.solvers.pnpdm import PnPDM
from cmi_lightning.solvers.reddiff import REDDiff
from cmi_lightning.solvers.renoise import Renoise
from cmi_lightning.solvers.resampled import Resampled

__all__ = [
    "DAPS",
    "DDIM",
    "DDPM",
    "DDRM",
    "FPS",
    "DDNMPlus",
    "DPMSolver",
    "Euler",
    "Heun",
    "PnPDM",
    "REDDiff",
    "Renoise",
    "Resampled",
    "Solver",
]
