"""Unconditional samples of a network in training."""

from __future__ import annotations

import copy
import math

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.callbacks.base import output_folder
from cmi_lightning.callbacks.drawing import save_png, tile, to_tile
from cmi_lightning.callbacks.loggers import log_image
from cmi_lightning.checked import check
from cmi_lightning.denoisers.network import NetworkDenoiser
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Dense
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM
from cmi_lightning.training import ScoreTraining


class SampleGrid(L.Callback):
    """Draws images from the prior that ``ScoreTraining`` fits, as ``samples/<step>.png``.

    The same noise every time, so that the pictures show the training; deterministic DDIM. The
    network is copied: its mode and its gradients are left alone. To draw with averaged weights,
    list this callback before the averaging one, which takes the average out again at the same hook.

    Args:
        every_n_validations: draw after every n-th validation, ≥ 1.
        num_samples: images per grid.
        num_steps: network evaluations per image.
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        seed: seed of the noise.

    Example:
        >>> SampleGrid(num_samples=9).num_samples
        9
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        num_samples: int = 16,
        num_steps: int = 50,
        dirpath: str | None = None,
        seed: int = 0,
    ) -> None:
        self.every_n_validations, self.num_samples = every_n_validations, num_samples
        self.num_steps, self.dirpath, self.seed = num_steps, dirpath, seed
        check(
            self,
            "seed",
            every_n_validations="[1, inf)",
            num_samples="[1, inf)",
            num_steps="[1, inf)",
        )
        self.validations = 0
        self.image_shape: tuple[int, ...] | None = None

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Learn the images' shape."""
        self.image_shape = tuple(batch["x"].shape[1:])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and write the samples."""
        if trainer.sanity_checking or not trainer.is_global_zero or self.image_shape is None:
            return
        self.validations += 1
        if self.validations % self.every_n_validations:
            return
        assert isinstance(pl_module, ScoreTraining)
        images = [to_tile(x) for x in self.draw(trainer, pl_module)]
        columns = math.ceil(math.sqrt(len(images)))
        grid = tile([images[i : i + columns] for i in range(0, len(images), columns)])
        folder = output_folder(trainer, self.dirpath) / "samples"
        save_png(grid, folder / f"{trainer.global_step:07d}.png")
        log_image(trainer, "samples", grid, trainer.global_step)

    def draw(self, trainer: L.Trainer, pl_module: ScoreTraining) -> Tensor:
        """Return samples (num_samples, C, H, W) of the network as it is now."""
        assert self.image_shape is not None
        like = torch.empty(self.num_samples, *self.image_shape, device=pl_module.device)
        network = copy.deepcopy(pl_module.network)
        denoiser = NetworkDenoiser(network, None, pl_module.schedule, pl_module.prediction)
        denoiser = denoiser.to(pl_module.device)
        noise = SampleNoise(self.seed, [f"sample/{i}" for i in range(self.num_samples)])
        steps = min(self.num_steps, len(pl_module.schedule))
        sampler = Sampler(denoiser, DDIM(), num_steps=steps)
        nothing = Dense(like.new_empty(0, like[0].numel()), self.image_shape)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            return sampler.run(Problem(nothing(like), nothing, 0.0), noise, like)
