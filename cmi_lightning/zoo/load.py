"""A prior by its name, folder or place on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmi_lightning.denoisers.base import Denoiser
from cmi_lightning.denoisers.diffusers_files import library, load_module, network_of
from cmi_lightning.denoisers.diffusers_models import DiffusersDenoiser
from cmi_lightning.denoisers.latent import LatentPrior
from cmi_lightning.denoisers.network import NetworkDenoiser
from cmi_lightning.denoisers.presets import unet_prior
from cmi_lightning.denoisers.weights import autoencoder_of, hub_folder
from cmi_lightning.errors import InputError
from cmi_lightning.files import read_json
from cmi_lightning.zoo.cards import CARDS, Card

LARGE = 50_000_000  # parameters from which memory is saved


def load_prior(
    name: Any,
    weights: str | None = None,
    condition: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    checkpoint: bool | None = None,
) -> Denoiser:
    """Return a prior by name.

    Args:
        name: of a card ("photos-64", "ffhq-256"; ``cmi-lightning priors`` lists them); "hf://owner/
            name" on the Hugging Face hub; a folder that diffusers' or our ``save_pretrained``
            wrote; or a pipeline of diffusers, which stays as it is. Pipelines with an autoencoder
            give a :class:`cmi_lightning.denoisers.LatentPrior`.
        weights: a card's file, where it is not to be downloaded.
        condition: what the network is told, see :class:`NetworkDenoiser`.
        unconditional: see :class:`NetworkDenoiser`.
        guidance_scale: see :class:`NetworkDenoiser`.
        checkpoint: half the memory for a tenth more time, of networks in guided-diffusion's layout;
            None saves it for large ones.

    Raises:
        InputError: for a name that nobody knows; for a file that is neither here nor to be had
            (with its name, size and address); and for weights that do not fit, or a network that is
            not told what it needs.

    >>> load_prior("photos-64").image_shape
    (3, None, None)
    """
    told: dict[str, Any] = {
        "condition": condition,
        "unconditional": unconditional,
        "guidance_scale": guidance_scale,
    }
    if not isinstance(name, str | Path):
        return _of_pipeline(name, told)
    known = next((c for c in CARDS.values() if c.name == name), None)
    if known is None or known.repo:
        if weights is not None:
            raise InputError(f"weights are a card's file: for '{name}' give their folder as name.")
        return _of_folder(_folder(known, str(name)), told)
    if checkpoint is None:
        checkpoint = known.parameters > LARGE
    return unet_prior(known.name, weights or _place(known), checkpoint, **told)


def _place(card: Card) -> str:
    """Return where a card's weights are: in the package, in this folder, or at their address."""
    if card.file is None:
        return card.name
    here = [name for name in (card.file.name, *card.file.other_names) if Path(name).is_file()]
    return here[0] if here else card.file.url if card.file.direct else card.file.name


def _folder(card: Card | None, name: str) -> Path:
    if card is None and "/" not in name and not Path(name).expanduser().is_dir():
        raise InputError(
            f"There is no prior '{name}': use {', '.join(CARDS)}; or a folder that save_pretrained "
            "wrote; or hf://owner/name of the Hugging Face hub."
        )
    return hub_folder(f"hf://{card.repo}" if card else name)


def _of_folder(folder: Path, told: dict[str, Any]) -> Denoiser:
    """Return the prior that our ``save_pretrained`` or diffusers' wrote."""
    config = folder / "config.json"
    if config.is_file() and "network" in read_json(config):
        return NetworkDenoiser.from_pretrained(folder, **told)
    beside = autoencoder_of(f.name for f in folder.iterdir() if f.is_dir())
    if beside is None:
        return DiffusersDenoiser(str(folder), **told)
    network, settings, _ = network_of(str(folder), latent=True)
    decoder = load_module(library(str(folder)), folder / beside)
    return LatentPrior(DiffusersDenoiser(network, scheduler=settings, **told), decoder)


def _of_pipeline(pipeline: Any, told: dict[str, Any]) -> Denoiser:
    """Return the prior of a pipeline, of latents where it has an autoencoder."""
    parts = getattr(pipeline, "__dict__", {})
    beside = autoencoder_of(name for name, part in parts.items() if part is not None)
    if beside is None:
        return DiffusersDenoiser(pipeline, **told)
    network, settings, _ = network_of(pipeline, latent=True)
    denoiser = DiffusersDenoiser(network, scheduler=settings, **told)
    return LatentPrior(denoiser, getattr(pipeline, beside))
