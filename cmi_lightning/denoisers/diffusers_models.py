"""Networks of diffusers, as files or as objects: U-Nets and transformers, of pixels or latents."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmi_lightning.denoisers.checkpoints import SUFFIXES, kind_of
from cmi_lightning.denoisers.fitting import misfit
from cmi_lightning.denoisers.weights import autoencoder_of, hub_folder, network_folder
from cmi_lightning.denoisers.wrapped import Output, WrappedNetwork
from cmi_lightning.errors import InputError, first_line
from cmi_lightning.schedule import Level, Schedule, ScheduleName

KINDS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
_PREDICTIONS: dict[str, Output] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


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
            settings = dict(scheduler) if isinstance(scheduler, Mapping) else _settings(scheduler)
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
            schedule = _schedule(settings, where, tokens)
        super().__init__(
            network,
            None,
            schedule,
            prediction or _prediction(settings, where),
            (channels, height, width),
            value_range,
            learns,
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


def network_of(
    model: Any, variant: str | None = None, part: str | None = None, latent: bool = False
) -> tuple[Any, dict[str, Any], str]:
    """Return the network of a pipeline, a folder or a hub id, its scheduler's settings, its name.

    Args:
        model: see :class:`DiffusersDenoiser`.
        variant: see there.
        part: ``weights_part`` there.
        latent: a network beside an autoencoder is wanted.

    Raises:
        InputError: see :class:`DiffusersDenoiser`.
    """
    if isinstance(model, str | Path):
        diffusers = library(str(model))
        folder = hub_folder(str(model))
        home = network_folder(folder, part, latent)
        _refuse_kind(config_of(home).get("_class_name"), str(home))
        return load_module(diffusers, home, variant), scheduler_config(folder), str(folder)
    name = type(model).__name__
    if isinstance(model, nn.Module):
        _refuse_kind(name, name)
        return model, {}, name
    network = getattr(model, "unet", None) or getattr(model, "transformer", None)
    if network is None:
        raise InputError(
            f"A {name} is no network of diffusers: give a folder, an id on the hub, a pipeline, or "
            f"one of {', '.join(KINDS)}."
        )
    beside = autoencoder_of(k for k, v in vars(model).items() if v is not None)
    if beside is not None and not latent:
        raise InputError(
            f"The pipeline {name} has an autoencoder ({beside}), so that its network works on "
            "latents and not on pixels: give the pipeline to cmi_lightning.zoo.load_prior."
        )
    return network_of(network)[0], _settings(model.scheduler), name


def _settings(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's settings; arguments by position count there as defaults, wrongly."""
    kept = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return {"_class_name": type(scheduler).__name__, **kept}


def library(model: str) -> Any:
    """Return the package diffusers.

    Raises:
        InputError: where it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise InputError(
            f"The network '{model}' needs diffusers: pip install 'cmi-lightning[diffusers]'."
        ) from error
    return diffusers


def _refuse_kind(kind: str | None, where: str) -> None:
    if kind not in KINDS:
        raise InputError(f"'{where}' holds a {kind}: a prior is one of {', '.join(KINDS)}.")


def config_of(home: Path) -> dict[str, Any]:
    """Return the configuration that diffusers wrote.

    Raises:
        InputError: if it is absent or not JSON.
    """
    path = home / "config.json" if home.is_dir() else home
    if not path.is_file():
        raise InputError(
            f"'{home}' has no config.json: give the folder that diffusers' save_pretrained wrote."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON ({error}): download the model again.") from error


def load_module(diffusers: Any, home: Path, variant: str | None = None) -> Any:
    """Return the module of a folder, its weights checked, in float32.

    Raises:
        InputError: for weights that are absent, or do not fit.
    """
    kind = config_of(home).get("_class_name")
    files = [f for f in sorted(home.iterdir()) if f.suffix in SUFFIXES]
    for file in files:
        kind_of(file)
    if not files:
        raise InputError(f"'{home}' has no weights: it needs diffusion_pytorch_model.safetensors.")
    try:
        network, info = getattr(diffusers, str(kind)).from_pretrained(
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


def scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the scheduler's configuration, {} where the folder has none."""
    inside = folder.name.startswith(("unet", "transformer"))
    for home in (folder / "scheduler", folder, *([folder.parent / "scheduler"] if inside else [])):
        if (home / "scheduler_config.json").is_file():
            return config_of(home / "scheduler_config.json")
    return {}


def _schedule(settings: dict[str, Any], where: str, tokens: int) -> Schedule:
    """Return the levels of a scheduler, of flow matching or of βs."""
    if not settings:
        raise InputError(
            f"'{where}' has no scheduler/scheduler_config.json: give the schedule that the "
            "network was trained on, such as schedule: linear."
        )
    name = settings.get("_class_name", "")
    if name.startswith("FlowMatch"):
        count, shift = settings.get("num_train_timesteps", 1000), settings.get("shift", 1.0)
        if settings.get("use_dynamic_shifting"):  # by the number of tokens, as Flux's pipeline
            first, last = settings["base_image_seq_len"], settings["max_image_seq_len"]
            low, high = settings["base_shift"], settings["max_shift"]
            shift = math.exp(low + (high - low) * (tokens - first) / (last - first))
        return Schedule.rectified(count - 1, shift, 1 / count, 1 - 1 / count, count)
    make = getattr(library(where), name, None)
    betas = getattr(make.from_config(settings), "betas", None) if make else None
    if betas is None:
        raise InputError(
            f"The scheduler {name} of '{where}' has no betas: give the schedule that the network "
            "was trained on."
        )
    return Schedule.from_betas(betas.double().tolist())


def _prediction(settings: dict[str, Any], where: str) -> Output:
    """Return what the network predicts, in our words."""
    if settings.get("_class_name", "").startswith("FlowMatch"):
        return "velocity"
    kind = settings.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise InputError(
            f"The scheduler of '{where}' has prediction_type '{kind}', and only "
            f"{', '.join(_PREDICTIONS)} are known: give prediction."
        )
    return _PREDICTIONS[kind]
