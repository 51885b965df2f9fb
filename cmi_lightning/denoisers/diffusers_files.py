"""What diffusers writes: networks with their weights checked, and the levels of schedulers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmi_lightning.denoisers.checkpoints import SUFFIXES, kind_of
from cmi_lightning.denoisers.fitting import misfit
from cmi_lightning.denoisers.weights import hub_folder, network_folder, refuse_latents
from cmi_lightning.denoisers.wrapped import Output
from cmi_lightning.errors import InputError, cause
from cmi_lightning.schedule import Schedule

KINDS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
_PREDICTIONS: dict[str, Output] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def network_of(
    model: Any, variant: str | None = None, part: str | None = None, latent: bool = False
) -> tuple[Any, dict[str, Any], str]:
    """Return the network of a pipeline, a folder or a hub id, its scheduler's settings, its name.

    The arguments are those of :class:`DiffusersDenoiser`; ``latent``: one of latents is wanted.
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
    if not latent:
        refuse_latents(name, (k for k, v in vars(model).items() if v is not None))
    return network_of(network)[0], settings_of(model.scheduler), name


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's settings; arguments by position count there as defaults, wrongly."""
    kept = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return {"_class_name": type(scheduler).__name__, **kept}


def library(model: str) -> Any:
    """Return the package diffusers, or raise an InputError where it is not installed."""
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
    """Return the configuration that diffusers wrote, or raise an InputError."""
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
    """Return the module of a folder, in float32; its weights must be there, and fit."""
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
        raise InputError(
            f"diffusers cannot load '{home}' ({cause(error)}): download the model again, or name "
            "its files by variant."
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


def schedule_of(settings: dict[str, Any], where: str, tokens: int) -> Schedule:
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


def prediction_of(settings: dict[str, Any], where: str) -> Output:
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
