"""Networks of other libraries: diffusers' UNet2DModel, and Karras et al.'s (EDM)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmi_lightning.denoisers.fitting import misfit
from cmi_lightning.denoisers.network import Output, ScheduleName, WrappedNetwork
from cmi_lightning.denoisers.weights import SUFFIXES, _kind, hub_folder, unet_folder
from cmi_lightning.errors import InputError, first_line
from cmi_lightning.schedule import Level, Schedule


class EDMDenoiser(WrappedNetwork):
    """x̂₀ = D(x_t/α; σ/α), for a network that denoises x₀ + σ ε, or for the raw F inside one.

    With ``preconditioned`` the network is D(x; σ) itself, as NVlabs' EDM objects are, called with
    (x, σ (B,)). Otherwise it is F, called with (c_in x, c_noise (B,)), and
    D(x; σ) = c_skip x + c_out F(c_in x; c_noise), where with s = ``sigma_data``

        c_skip = s²/(σ² + s²), c_out = σ s/√(σ² + s²), c_in = 1/√(σ² + s²), c_noise = ln(σ)/4.

    Dividing by α brings any other schedule, such as "linear" or "vp", to these terms, so that an
    EDM network also runs on the levels of a DDPM chain.

    Args:
        network: D, or F. NVlabs' ``.pkl`` files hold code: save ``ema.state_dict()`` of one as
            ``.safetensors`` once, and give the class (``EDMPrecond``) here.
        weights: see :class:`NetworkDenoiser`.
        schedule: levels; the default is 100 of Karras et al.'s from σ = 0.002 to 80.
        preconditioned: the network is D rather than F.
        sigma_data: standard deviation of the images, s, which F was trained with.
        image_shape: (C, H, W), with None where the network takes any size.
        value_range: see :class:`NetworkDenoiser`.
        sha256: checksum of the weights file.
        weights_part: see :class:`NetworkDenoiser`.

    Raises:
        InputError: see :class:`NetworkDenoiser`.

    Source: Karras et al. (2022), Table 1 and Eq. 7.
    """

    def __init__(
        self,
        network: nn.Module | Callable,
        weights: str | None,
        schedule: Schedule | ScheduleName = "edm",
        preconditioned: bool = True,
        sigma_data: float = 0.5,
        image_shape: tuple[int | None, int | None, int | None] | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        sha256: str | None = None,
        weights_part: str | None = None,
    ) -> None:
        super().__init__(
            network,
            weights,
            schedule,
            "x0",
            image_shape,
            value_range,
            False,
            sha256,
            weights_part,
        )
        if sigma_data <= 0:
            raise InputError(f"sigma_data must be positive, got {sigma_data:g}.")
        self.preconditioned, self.sigma_data = preconditioned, sigma_data

    def _call(self, u: Tensor, level: Level) -> Tensor:
        x, sigma = u / level.alpha, level.sigma / level.alpha
        output: Tensor
        if self.preconditioned:
            output = self.network(x, self._fill(u, sigma))
            return output
        total = sigma**2 + self.sigma_data**2
        output = self.network(x / math.sqrt(total), self._fill(u, math.log(sigma) / 4))
        c_out = sigma * self.sigma_data / math.sqrt(total)
        return self.sigma_data**2 / total * x + c_out * output


class DiffusersDenoiser(WrappedNetwork):
    """A diffusers ``UNet2DModel`` with its scheduler's βs, times and prediction type.

    Needs ``pip install 'cmi-lightning[diffusers]'``. Weights are loaded as diffusers does, but
    strictly. The network receives the scheduler's original time index, whatever the number of
    steps; of the scheduler nothing else is used, so that its steps, clipping and thresholding are
    those of our solvers. A chain of zero terminal SNR loses its last level
    (:meth:`Schedule.from_betas`).

    Args:
        model: a folder, of a pipeline (``unet/``, ``scheduler/``) or of a bare model, or the id of
            one on the Hugging Face hub ("google/ddpm-cat-256"), downloaded once.
        schedule: levels, where the folder has no scheduler, or instead of its own.
        prediction: what the network predicts; None asks the scheduler.
        size: (H, W) of the images, with None where any will do; by default that of its
            configuration.
        value_range: see :class:`NetworkDenoiser`.
        second_derivatives: use diffusers' plain attention. Its fused attention is faster and has no
            second derivative, which CMI by autograd needs.
        variant: diffusers' name of a set of files, such as "fp16"; computed in float32 all the
            same.
        weights_part: "unet" or "unet_ema", of a pipeline that has both.

    Raises:
        InputError: without diffusers; for a model that is no unconditional UNet2DModel, or works on
            the latents of an autoencoder; for weights
            that do not fit their configuration; for a scheduler without βs and no ``schedule``.
    """

    def __init__(
        self,
        model: str,
        schedule: Schedule | ScheduleName | None = None,
        prediction: Output | None = None,
        size: tuple[int | None, int | None] | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        second_derivatives: bool = True,
        variant: str | None = None,
        weights_part: str | None = None,
    ) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise InputError(
                f"The network '{model}' needs diffusers: pip install 'cmi-lightning[diffusers]'."
            ) from error
        folder = hub_folder(model)
        network = _unet(diffusers, folder, variant, weights_part)
        scheduler = _scheduler_config(folder)
        if schedule is None:
            schedule = _schedule(diffusers, scheduler, folder)
        config = network.config
        channels, outputs = config.in_channels, config.out_channels
        if outputs not in (channels, 2 * channels):
            raise InputError(
                f"'{folder}' maps {channels} channels to {outputs}: only as many, or twice as many "
                "(a learned variance), make a prior for images."
            )
        if outputs == 2 * channels and scheduler.get("variance_type") == "learned":
            raise InputError(
                f"'{folder}' has variance_type 'learned', the variance itself: only learned_range "
                "(Nichol & Dhariwal, 2021) is supported."
            )
        attention = [m for m in network.modules() if hasattr(m, "set_processor")]
        if second_derivatives:
            from diffusers.models.attention_processor import AttnProcessor

            for module in attention:
                module.set_processor(AttnProcessor())
        if size is None:
            size = config.sample_size
        height, width = (size, size) if isinstance(size, int | None) else size
        super().__init__(
            network,
            None,
            schedule,
            prediction or _prediction(scheduler, folder),
            (channels, height, width),
            value_range,
            outputs == 2 * channels,
        )
        self.integer_times = config.time_embedding_type == "learned"  # looked up in a table
        self.derivatives = 2 if second_derivatives or not attention else 1
        self.size_multiple = 2 ** (len(config.block_out_channels) - 1)

    def _call(self, u: Tensor, level: Level) -> Tensor:
        times = self._fill(u, level.time)
        output: Tensor = self.network(
            u, times.round().long() if self.integer_times else times
        ).sample
        return output


_PREDICTIONS: dict[str, Output] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON ({error}): download the model again.") from error
    return dict(config)


def _unet(diffusers: Any, folder: Path, variant: str | None, part: str | None) -> Any:
    """Return the UNet2DModel of a folder, its weights checked, in float32."""
    import torch

    home = unet_folder(folder, part)
    if not (home / "config.json").is_file():
        raise InputError(
            f"'{home}' has no config.json: give the folder that diffusers' save_pretrained wrote."
        )
    config = _config(home / "config.json")
    name = config.get("_class_name")
    if name != "UNet2DModel":
        raise InputError(f"'{home}' holds a {name}, and only UNet2DModel is a prior for images.")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise InputError(f"'{home}' is a class-conditional network, and only others are supported.")
    files = [f for f in sorted(home.iterdir()) if f.suffix in SUFFIXES]
    for file in files:
        _kind(file)
    if not files:
        raise InputError(f"'{home}' has no weights: it needs diffusion_pytorch_model.safetensors.")
    try:
        network, info = diffusers.UNet2DModel.from_pretrained(
            str(home),
            variant=variant,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
        )
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"diffusers cannot load '{home}' ({type(error).__name__}: {reason}): download the "
            "model again, or name its files by variant."
        ) from error
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    mismatched = {name: torch.empty(there) for name, there, _ in info["mismatched_keys"]}
    if missing or unexpected or mismatched:
        state = {k: v for k, v in network.state_dict().items() if k not in missing}
        state |= mismatched | {name: torch.empty(0) for name in unexpected}
        raise InputError(misfit(f"The weights in '{home}'", network, state))
    return network


def _scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the scheduler's configuration, {} where the folder has none."""
    beside = [folder.parent / "scheduler"] if folder.name.startswith("unet") else []
    for home in (folder / "scheduler", folder, *beside):
        if (home / "scheduler_config.json").is_file():
            return _config(home / "scheduler_config.json")
    return {}


def _schedule(diffusers: Any, config: dict[str, Any], folder: Path) -> Schedule:
    """Return the levels of a scheduler's βs."""
    if not config:
        raise InputError(
            f"'{folder}' has no scheduler/scheduler_config.json: give the schedule that the "
            "network was trained on, such as schedule: linear."
        )
    name = config.get("_class_name", "")
    make = getattr(diffusers, name, None)
    betas = getattr(make.from_config(config), "betas", None) if make else None
    if betas is None:
        raise InputError(
            f"The scheduler {name} of '{folder}' has no betas: give the schedule that the network "
            "was trained on."
        )
    return Schedule.from_betas(betas.double().tolist())


def _prediction(config: dict[str, Any], folder: Path) -> Output:
    """Return what the network predicts, in our words."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise InputError(
            f"The scheduler of '{folder}' has prediction_type '{kind}', and only "
            f"{', '.join(_PREDICTIONS)} are known: give prediction."
        )
    return _PREDICTIONS[kind]
