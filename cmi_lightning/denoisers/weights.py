"""Loading a network's weights: strictly, without running code, naming the cause of a misfit."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmi_lightning.denoisers.fitting import fitted, several
from cmi_lightning.errors import InputError, first_line
from cmi_lightning.files import sha256 as checksum

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {
    "fashion-mnist": ASSETS / "fashion_mnist_prior.safetensors",
    "photos-64": ASSETS / "photos" / "photos64.safetensors",
}
FORMATS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Published:
    """A public checkpoint: what its file must be, and where its authors published it.

    Attributes:
        file: the name it is published under.
        size: bytes.
        sha256: of the file.
        url: a direct download, or the authors' page that links to one.
    """

    file: str
    size: int
    sha256: str
    url: str

    def __str__(self) -> str:
        return f"{self.file} ({self.size:,} bytes, SHA-256 {self.sha256}) from {self.url}"


_IMAGENET = Published(
    "256x256_diffusion_uncond.pt",
    2_211_383_297,
    "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_diffusion_uncond.pt",
)
PUBLISHED = {
    "ffhq_10m.pt": Published(
        "ffhq_10m.pt",
        374_417_833,
        "81d535743156ec6be34d8668e6920da94f0614074d7793a16c8fa9e306237faa",
        "https://drive.google.com/drive/folders/1jElnRoFv7b31fG0v6pTSQkelbSX3xGZh, the folder of "
        "https://github.com/DPS2022/diffusion-posterior-sampling",
    ),
    "256x256_diffusion_uncond.pt": _IMAGENET,
    "imagenet256.pt": _IMAGENET,  # DPS's name for it
}
"""The published checkpoints, by file name."""


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
    network.load_state_dict(fitted(network, _read(path), path, part))


def find_weights(
    source: str | Path,
    sha256: str | None = None,
    expected: str | None = None,
    part: str | None = None,
) -> Path:
    """Return the file that ``source`` means, downloaded if it is a URL.

    Args:
        source: as for :func:`load_weights`.
        sha256: checksum of the file.
        expected: name of the published file that it should be, for the message.
        part: "unet" or "unet_ema", of a pipeline that has both.

    Raises:
        InputError: if there is none, or its checksum is not ``sha256``.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f"sha256 must be 64 hexadecimal digits, got '{sha256}'.")
    url = urllib.parse.urlparse(str(source))
    if url.scheme in ("http", "https"):
        path = _downloaded(str(source))
    elif url.scheme == "file":
        path = Path(urllib.request.url2pathname(url.path))
    else:
        path = SHIPPED.get(str(source), Path(source).expanduser())
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
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"])
        return folder
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"There is no folder '{model}', and the Hugging Face hub gave none "
            f"({type(error).__name__}: {reason}): correct the name, or download the model and give "
            "its folder."
        ) from error


def _absent(source: str, name: str) -> str:
    if known := PUBLISHED.get(name):
        return (
            f"No weights at '{source}': download {known}, and give its path by "
            "--model.denoiser.init_args.weights."
        )
    return (
        f"No weights at '{source}': give an existing .safetensors, .pt or .pth file, a folder with "
        f"one, a URL, or one of the shipped priors {sorted(SHIPPED)}."
    )


def unet_folder(folder: Path, part: str | None = None) -> Path:
    """Return the folder of a diffusers pipeline's network, or ``folder`` if it is no pipeline.

    Raises:
        InputError: where averaged weights lie beside and ``part`` does not choose, or for a
            pipeline with an autoencoder, whose network works on latents.
    """
    for home in (folder, folder.parent) if folder.name.startswith("unet") else (folder,):
        index = home / "model_index.json"
        names = {f.name for f in home.iterdir() if f.is_dir()} if index.is_file() else set()
        if found := sorted(names & {"vae", "vqvae", "movq", "vqmodel"}):
            raise InputError(
                f"The pipeline '{home}' has an autoencoder ({found[0]}), so that its network works "
                "on latents and not on pixels, which is not supported: use a pipeline without one."
            )
    found = [name for name in ("unet", "unet_ema") if (folder / name).is_dir()]
    if part in found:
        return folder / str(part)
    if len(found) > 1:
        raise InputError(several(f"'{folder}'", found))
    return folder / found[0] if found else folder


def _in_folder(folder: Path, part: str | None) -> Path:
    """Return the one weights file of a folder, or the index of its shards."""
    folder = unet_folder(folder, part)
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


def _downloaded(url: str) -> Path:
    """Return the copy of ``url`` in torch.hub's cache, downloading it the first time."""
    # A folder per address: many files are called model.safetensors.
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name or "weights"
    path = Path(torch.hub.get_dir()) / "checkpoints" / folder / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"Cannot download '{url}' ({error}): correct the address, or download the file "
            "yourself and give its path."
        ) from error
    try:
        _kind(path)
    except InputError:
        path.unlink()
        raise
    return path


def _kind(path: Path) -> str:
    """Return "safetensors", "zip" (torch.save) or "other", by the file's content.

    Raises:
        InputError: for an empty file, a web page, a git-lfs pointer or a file that is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise InputError(f"'{path}' is empty: download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"'{path}' is a git-lfs pointer, not the weights: run `git lfs pull` in its repository."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(
            f"'{path}' is a web page, not weights: use the address of the file itself (on Hugging "
            "Face …/resolve/…, not …/blob/…), or download it in a browser."
        )
    for magic, kind in FORMATS.items():
        if head.startswith(magic):
            raise InputError(
                f"'{path}' is {kind}, not weights of PyTorch: use the .pt or .safetensors of the "
                "network's authors."
            )
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise _cut_short(path, size, None)
        return "zip"
    if len(head) > 8 and head[8:9] == b"{":
        start = 8 + int.from_bytes(head[:8], "little")
        if start > size:
            raise _cut_short(path, size, start)
        with path.open("rb") as file:
            file.seek(8)
            try:
                header = json.loads(file.read(start - 8))
            except ValueError:
                return "other"
        try:
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (AttributeError, KeyError, TypeError, IndexError):
            return "other"
        if start + max(ends, default=0) > size:
            raise _cut_short(path, size, start + max(ends))
        return "safetensors"
    return "other"


def _cut_short(path: Path, size: int, whole: int | None) -> InputError:
    known = PUBLISHED.get(path.name)
    whole = whole or (known.size if known else None)
    of = f" of {whole:,}" if whole else ""
    return InputError(f"'{path}' is cut short (it has {size:,} bytes{of}): download it again.")


def _read(path: Path) -> Any:
    """Return what a checkpoint holds, without unpickling code."""
    if path.name.endswith(".index.json"):
        return _shards(path)
    shards = re.search(r"-\d{5}-of-(\d{5})\.", path.name)
    if shards and int(shards[1]) > 1:
        raise InputError(
            f"'{path}' is one of {int(shards[1])} shards: give their folder, or .index.json."
        )
    return _tensors(path)


def _tensors(path: Path) -> Any:
    kind = _kind(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"Cannot read the weights '{path}' ({type(error).__name__}: {reason}); only plain "
            "tensors are loaded (weights_only=True): where you trust the file, load it yourself "
            "once and save the network's state_dict() as .safetensors."
        ) from error


def _shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{index}' is no index of shards: download it again.") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"'{index}' names {len(files)} shards, and {', '.join(absent[:5])} "
            f"{'is' if len(absent) == 1 else 'are'} not there: download the rest."
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _tensors(file)
    return state
