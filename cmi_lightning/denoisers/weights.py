"""Loading a network's weights: strictly, without running code, naming the cause of a misfit."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from cmi_lightning.denoisers.checkpoints import SUFFIXES, kind_of, read_checkpoint
from cmi_lightning.denoisers.fitting import fitted, several
from cmi_lightning.errors import InputError, cause
from cmi_lightning.files import download, write
from cmi_lightning.files import sha256 as checksum
from cmi_lightning.zoo.cards import CARDS, published, shipped


def load_weights(
    network: nn.Module, source: str | Path, sha256: str | None = None, part: str | None = None
) -> None:
    """Load a state dict into ``network``: every tensor, by name and shape; nothing is unpickled.

    Half-precision files are loaded into the precision the network has. A file may hold more than
    the state dict (a Lightning checkpoint, a "model" or "ema" entry) and prefixes ("module.",
    "network."): the one place where the network's tensors are all found is taken.

    Args:
        network: the module to fill.
        source: a ``.safetensors``, ``.pt`` or ``.pth`` file; a folder with one such file, with
            shards and their index, or as diffusers writes them; an http(s) or file URL, downloaded
            once into torch.hub's cache; or the name of a shipped prior ("fashion-mnist").
        sha256: the file's checksum, 64 hexadecimal digits; checked if given.
        part: which part of a checkpoint that holds the network several times, such as "ema",
            "model_ema" or "unet_ema"; without it such a checkpoint is refused.

    Raises:
        InputError: for a file that is absent, no checkpoint, cut short or of another checksum; and
            for weights that do not fit, with the first tensors that are missing, unexpected or
            misshapen and the likely cause.
    """
    path = find_weights(source, sha256, part=part)
    if path.parent.name == part:  # a folder beside another, as diffusers keeps averages
        part = None
    network.load_state_dict(fitted(network, read_checkpoint(path), path, part))


def save_weights(network: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a network's weights as safetensors, floating-point ones in ``dtype``."""
    whole = torch.contiguous_format
    state = {
        name: v.cpu().to(dtype if v.is_floating_point() else None).clone(memory_format=whole)
        for name, v in network.state_dict().items()
    }
    write(path, save(state))


def find_weights(
    source: str | Path,
    sha256: str | None = None,
    expected: str | None = None,
    part: str | None = None,
) -> Path:
    """Return the file that ``source`` means, downloaded if it is a URL.

    Arguments and errors are those of :func:`load_weights`; ``expected`` is the name of the
    published file that it should be, for the message.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f"sha256 must be 64 hexadecimal digits, got '{sha256}'.")
    url = urllib.parse.urlparse(str(source))
    if url.scheme in ("http", "https"):
        path = _downloaded(str(source))
    elif url.scheme == "file":
        path = Path(urllib.request.url2pathname(url.path))
    else:
        path = shipped().get(str(source), Path(source).expanduser())
    if path.is_dir():
        path = _in_folder(path, part)
    if not path.is_file():
        raise InputError(_absent(str(source), expected or path.name))
    if sha256 is not None:
        digest = checksum(path)
        if digest != sha256.lower():
            raise InputError(
                f"'{path}' has SHA-256 {digest}, not {sha256.lower()}: delete it and download it "
                "again, or correct sha256."
            )
    return path


def hub_folder(model: str) -> Path:
    """Return a folder, or the copy of "hf://owner/name" or "owner/name", downloaded once."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = model.removeprefix("hf://")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(
            f"There is no folder '{model}': give one that save_pretrained wrote, or a model's id "
            "on the Hugging Face hub, 'owner/name'."
        )
    known = next((c for c in CARDS.values() if c.repo == name), None)
    try:
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNUSED))
        if not any(folder.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"], ignore_patterns=UNUSED)
    except Exception as error:
        size = f" ({known.size})" if known else ""
        raise InputError(
            f"There is no folder '{model}', and the Hugging Face hub gave none "
            f"({cause(error)}): correct the name, or download the model from "
            f"https://huggingface.co/{name}{size} and give its folder."
        ) from error
    for file in folder.rglob("*"):
        # The hub's cache names a large file by the SHA-256 that the hub has of it.
        told = file.resolve().name
        if re.fullmatch("[0-9a-f]{64}", told) and checksum(file) != told:
            raise InputError(
                f"'{file}' has not the SHA-256 that the hub has of it: delete it and try again."
            )
    return folder


def _absent(source: str, name: str) -> str:
    if known := published(name):
        return (
            f"No weights at '{source}': download {known}, and give its path by "
            "--model.denoiser.init_args.weights."
        )
    return (
        f"No weights at '{source}': give an existing .safetensors, .pt or .pth file, a folder with "
        f"one, a URL, or one of the shipped priors {sorted(shipped())}."
    )


# Parts of a pipeline that no prior needs, and that may be larger than what one needs.
UNUSED = ["text_encoder*", "tokenizer*", "safety_checker*", "feature_extractor*", "image_encoder*"]
AUTOENCODERS = ("vae", "vqvae", "movq", "vqmodel")


def autoencoder_of(parts: Iterable[str]) -> str | None:
    """Return the name of a pipeline's autoencoder among its parts' names, or None."""
    names = set(parts)
    return next((name for name in AUTOENCODERS if name in names), None)


def refuse_latents(pipeline: str, parts: Iterable[str]) -> None:
    """Refuse a pipeline whose network works on latents: it has an autoencoder among its parts."""
    if found := autoencoder_of(parts):
        raise InputError(
            f"The pipeline {pipeline} has an autoencoder ({found}), so that its network works on "
            "latents and not on pixels: give the pipeline to cmi_lightning.zoo.load_prior."
        )


def network_folder(folder: Path, part: str | None = None, latent: bool = False) -> Path:
    """Return the folder of a diffusers pipeline's network, or ``folder`` if it is no pipeline.

    ``part`` is "unet" or "unet_ema" of a pipeline that has both; ``latent``: a network of latents
    is wanted. A pipeline that fits neither is refused.
    """
    inside = folder.name.startswith(("unet", "transformer"))
    for home in (folder, folder.parent) if inside else (folder,):
        if not latent and (home / "model_index.json").is_file():
            refuse_latents(f"'{home}'", (f.name for f in home.iterdir() if f.is_dir()))
    inner = [name for name in ("unet", "unet_ema", "transformer") if (folder / name).is_dir()]
    if part in inner:
        return folder / str(part)
    if len(inner) > 1:
        raise InputError(several(f"'{folder}'", inner))
    return folder / inner[0] if inner else folder


def _in_folder(folder: Path, part: str | None) -> Path:
    """Return the one weights file of a folder, or the index of its shards."""
    folder = network_folder(folder, part)
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
    if indices := sorted(folder.glob("*.index.json")):
        files = indices
    if len(files) != 1:
        found = ", ".join(f.name for f in files[:5]) or f"no {', '.join(SUFFIXES)}"
        raise InputError(f"The folder '{folder}' must hold one weights file, found {found}.")
    return files[0]


def cached(url: str) -> Path:
    """Return where torch.hub's cache keeps the copy of an address."""
    # A folder per address: many files are called model.safetensors.
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name or "weights"
    return Path(torch.hub.get_dir()) / "checkpoints" / folder / name


def _downloaded(url: str) -> Path:
    """Return the copy of ``url`` in torch.hub's cache, downloading it the first time."""
    path = cached(url)
    if path.is_file():
        return path
    known = published(path.name)
    try:
        download(url, path, (known and known.sha256) or "")
    except OSError as error:
        raise InputError(
            f"Cannot download '{url}' ({error}): correct the address, or download "
            f"{known or 'the file'} yourself and give its path."
        ) from error
    try:
        kind_of(path)
    except InputError:
        path.unlink()
        raise
    return path
