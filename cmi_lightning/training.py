"""Training of a score network: how the shipped prior was made, and how to make your own."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from cmi_lightning.checked import check
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Schedule, ScheduleName

Fitted = Literal["epsilon", "v", "velocity"]


class ScoreTraining(L.LightningModule):
    """Fits ε_θ by E ‖ε_θ(α_t x₀ + σ_t ε, t) − ε‖², t uniform (Ho et al. 2020, Eq. 14).

    With ``prediction="v"`` the network fits v = α_t ε − σ_t x₀ by its own squared error (Salimans &
    Ho 2022). Its error in x̂₀ stays bounded where α_t is small; an error in ε is divided by α_t.
    ``prediction="velocity"`` does so with u = ε − x₀ of straight paths, ``schedule="rectified"``
    (Lipman et al. 2023, Eq. 23, with t counted from the image). Validation is the squared error of
    ε in all cases.

    The times of a batch are stratified: one in each of B equal parts of the chain, which leaves
    the expected gradient unchanged and lowers its variance. Validation draws fixed noise at
    ``num_eval_levels`` evenly spaced levels, so that its loss can be compared between epochs.

    Args:
        network: maps x_t (B, C, H, W) and times (B,) to ε (B, C, H, W).
        schedule: noise levels, or their name: "linear" (the DDPM chain of 1000), "cosine", "edm",
            "vp" or "rectified".
        learning_rate: peak learning rate of AdamW, after ``warmup_steps``.
        warmup_steps: steps of linear warm-up; the rest is a cosine decay to zero at the end of
            training (``trainer.max_steps`` or ``max_epochs``).
        weight_decay: decoupled weight decay.
        num_eval_levels: noise levels averaged by the validation loss.
        low_noise_power: times are drawn as N·u^power, u uniform on [0, 1]: 1 is the uniform loss
            above; larger values spend more samples on the last, least noisy levels.
        prediction: what the network returns: "epsilon", "v" (with α² + σ² = 1) or "velocity" (with
            α + σ = 1).
    """

    alphas: Tensor
    sigmas: Tensor
    times: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule | ScheduleName = "linear",
        learning_rate: float = 1e-3,
        warmup_steps: int = 500,
        weight_decay: float = 0.0,
        num_eval_levels: int = 20,
        low_noise_power: float = 1.0,
        prediction: Fitted = "epsilon",
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = Schedule.named(schedule)
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.weight_decay, self.num_eval_levels = weight_decay, num_eval_levels
        self.low_noise_power = low_noise_power
        self.prediction = prediction
        positive, least = "(0, inf)", "[0, inf)"
        check(self, "prediction", learning_rate=positive, low_noise_power=positive)
        check(self, warmup_steps=least, weight_decay=least, num_eval_levels="[1, inf)")
        if prediction == "velocity":
            self.schedule.refuse_curved()
        for name in ("alphas", "sigmas", "times"):
            values = torch.tensor(getattr(self.schedule, name), dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def loss(self, x0: Tensor, indices: Tensor, noise: Tensor) -> Tensor:
        """Return the mean squared error of a batch (B, C, H, W) at levels ``indices``."""
        alpha, sigma = (v[indices][:, None, None, None] for v in (self.alphas, self.sigmas))
        predicted = self.network(alpha * x0 + sigma * noise, self.times[indices])
        if predicted.shape != noise.shape:
            raise InputError(
                f"The network returns {tuple(predicted.shape)} for images {tuple(noise.shape)}: "
                "training fits no variance, so set in_channels to the images' channels and "
                "learn_variance to false."
            )
        if self.prediction == "epsilon":
            target = noise
        elif self.prediction == "v":
            target = alpha * noise - sigma * x0
        else:
            target = noise - x0
        error = (predicted.float() - target).square()
        if self.prediction != "epsilon" and not self.training:
            error = alpha**2 * error  # ε − ε̂ = α (target − predicted)
        return error.mean()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """One step on ``batch["x"]`` (B, C, H, W) in [−1, 1]."""
        x0 = batch["x"]
        strata = torch.arange(len(x0), device=x0.device) + torch.rand(len(x0), device=x0.device)
        last = len(self.schedule) - 1
        uniform = (strata / len(x0)) ** self.low_noise_power
        indices = (uniform * len(self.schedule)).long().clamp(max=last)
        loss = self.loss(x0, indices, torch.randn_like(x0))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Average the loss over evenly spaced levels with noise fixed per batch index."""
        x0 = batch["x"]
        generator = torch.Generator().manual_seed(batch_idx)
        for level in torch.linspace(0, len(self.schedule) - 1, self.num_eval_levels).round():
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            indices = torch.full((len(x0),), int(level), device=x0.device)
            loss = self.loss(x0, indices, noise)
            self.log("val/loss", loss, prog_bar=True, batch_size=len(x0), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay over the whole training."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            self.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.weight_decay,
        )
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise InputError("Training needs an end: set trainer.max_steps or trainer.max_epochs.")

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
