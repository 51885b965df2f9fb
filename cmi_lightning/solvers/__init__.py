"""Solvers of the reverse diffusion."""

from cmi_lightning.solvers.ancestral import DDIM, DDPM
from cmi_lightning.solvers.base import Solver
from cmi_lightning.solvers.heun import Heun

__all__ = ["DDIM", "DDPM", "Heun", "Solver"]
