"""Networks of diffusers as priors: U-Nets and transformers, of pixels or latents."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmi_lightning.denoisers.diffusers_files import (
    network_of,
    prediction_of,
    schedule_of,
    settings_of,
)
from cmi_lightning.denoisers.wrapped import Output, WrappedNetwork
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level, Schedule, ScheduleName


class DiffusersDenoiser(WrappedNetwork):
    """A network of diffusers with its scheduler's levels, times and prediction type.

    Needs ``pip install 'cmi-lightning[diffusers]'``. Weights are loaded as diffusers does, but
    strictly. The network receives the scheduler's original times, whatever the number of steps; of
    the scheduler nothing else is used, so that its steps, clipping and thresholding are those of
    our solvers. A chain of zero terminal SNR loses its last level (:meth:`Schedule.from_betas`).

    U-Nets (``UNet2DModel``, ``UNet2DConditionModel``) and transformers (DiT, Stable Diffusion 3,
    Flux) are taken; those of latents belong into :class:`LatentPrior`, which
    :func:`cmi_lightning.zoo.load_prior` makes of a whole pipeline.

    Args:
        model: a network, or a pipeline of one, which stay as they are; or a folder, of a pipeline
            (``unet/``, ``scheduler/``) or of a bare network, or the id of one on the Hugging Face
            hub ("google/ddpm-cat-256"), downloaded once.
        schedule: levels, where there is no scheduler, or instead of its own.
        prediction: what the network predicts; None asks the scheduler.
        size: (H, W) of the images, with None where any will do; by default that of its
            configuration.
        value_range: see :class:`NetworkDenoiser`.
        second_derivatives: use PyTorch's plain attention. Its fused attention is faster and has no
            second derivative, which CMI by autograd needs.
        variant: diffusers' name of a set of files, such as "fp16"; computed in float32 all the
            same.
        weights_part: "unet" or "unet_ema", of a pipeline that has both.
        scheduler: a diffusers scheduler, where ``model`` is a network.
        condition: see :class:`NetworkDenoiser`: ``class_labels``, ``encoder_hidden_states``, ….
        unconditional: see :class:`NetworkDenoiser`.
        guidance_scale: see :class:`NetworkDenoiser`.

    Raises:
        InputError: without diffusers; for another class of network, one that is not told what it
            needs, or one beside an autoencoder; for weights that do not fit their configuration;
            for a scheduler without levels and no ``schedule``.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule | ScheduleName | None = None,
        prediction: Output | None = None,
        size: tuple[int | None, int | None] | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        second_derivatives: bool = True,
        variant: str | None = None,
        weights_part: str | None = None,
        scheduler: Any = None,
        condition: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        network, settings, where = network_of(model, variant, weights_part)
        if scheduler is not None:
            settings = dict(scheduler) if isinstance(scheduler, Mapping) else settings_of(scheduler)
        config = network.config
        self.kind = type(network).__name__
        flux = self.kind == "FluxTransformer2DModel"  # it sees patches of 2×2 pixels as channels
        channels = config.in_channels // 4 if flux else config.in_channels
        outputs = config.get("out_channels") or config.in_channels
        if outputs not in (config.in_channels, 2 * config.in_channels):
            raise InputError(
                f"'{where}' maps {channels} channels to {outputs}: only as many, or twice as many "
                "(a learned variance), make a prior for images."
            )
        learns = outputs == 2 * config.in_channels
        if learns and settings.get("variance_type") == "learned":
            raise InputError(
                f"'{where}' has variance_type 'learned', the variance itself: only learned_range "
                "(Nichol & Dhariwal, 2021) is supported."
            )
        if size is None:
            size = config.get("sample_size")
        height, width = (size, size) if isinstance(size, int | None) else size
        if schedule is None:
            tokens = ((height or 64) // 2) * ((width or 64) // 2)
            schedule = schedule_of(settings, where, tokens)
        super().__init__(
            network,
            None,
            schedule,
            prediction or prediction_of(settings, where),
            (channels, height, width),
            value_range,
            learns_variance=learns,
            condition=condition,
            unconditional=unconditional,
            guidance_scale=guidance_scale,
        )
        self.integer_times = config.get("time_embedding_type") == "learned"  # looked up in a table
        self.plain_attention = second_derivatives
        attention = any(hasattr(m, "set_processor") for m in network.modules())
        self.derivatives = 2 if second_derivatives or not attention else 1
        blocks = config.get("block_out_channels")
        self.size_multiple = 2 ** (len(blocks) - 1) if blocks else 2 if flux else config.patch_size
        self.first = next(iter(inspect.signature(network.forward).parameters))

    def _call(self, u: Tensor, level: Level, told: dict[str, Any]) -> Tensor:
        times = self._fill(u, level.time)
        if self.integer_times:
            times = times.round().long()
        shape = u.shape
        if self.kind == "FluxTransformer2DModel":
            u, told = _patches(u, told)
            times = times / 1000  # which the network multiplies again
        told = {k: v.to(u.dtype) if _floats(v) else v for k, v in told.items()}
        plain = sdpa_kernel(SDPBackend.MATH) if self.plain_attention else contextlib.nullcontext()
        with plain:
            output: Tensor = self.network(
                **{self.first: u}, timestep=times, **told, return_dict=False
            )[0]
        if self.kind == "FluxTransformer2DModel":
            grid = output.unflatten(1, (shape[2] // 2, shape[3] // 2)).movedim(3, 1)
            output = nn.functional.pixel_shuffle(grid, 2)
        return output


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _patches(u: Tensor, told: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return Flux's tokens of images, 2×2 pixels each, and the places of images and text."""
    grid = nn.functional.pixel_unshuffle(u, 2)
    height, width = grid.shape[2:]
    ids = torch.zeros(height, width, 3, device=u.device, dtype=u.dtype)
    ids[..., 1] += torch.arange(height, device=u.device)[:, None]
    ids[..., 2] += torch.arange(width, device=u.device)
    text = ids.new_zeros(told["encoder_hidden_states"].shape[1], 3)
    places = {"img_ids": ids.flatten(0, 1), "txt_ids": text}
    return grid.flatten(2).transpose(1, 2), told | places
