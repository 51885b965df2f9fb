"""Solvers of the reverse diffusion."""

from cmi_lightning.solvers.ancestral import DDIM, DDPM
from cmi_lightning.solvers.base import Solver
from cmi_lightning.solvers.heun import Heun
from cmi_lightning.solvers.renoise import Renoise
from cmi_lightning.solvers.resampled import Resampled

__all__ = ["DDIM", "DDPM", "Heun", "Renoise", "Resampled", "Solver"]
