"""Loading a network's weights: strictly, without running code, naming the cause of a misfit."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmi_lightning.errors import InputError, first_line

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {
    "fashion-mnist": ASSETS / "fashion_mnist_prior.safetensors",
    "photos-64": ASSETS / "photos" / "photos64.safetensors",
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
        source: a ``.safetensors``, ``.pt`` or ``.pth`` file; a folder with one such file, or as
            diffusers writes them; an http(s) or file URL, downloaded once into torch.hub's cache;
            or the name of a shipped prior ("fashion-mnist").
        sha256: the file's checksum, 64 hexadecimal digits; checked if given.
        part: which part of a checkpoint that holds the network several times, such as "ema".

    Raises:
        InputError: for a file that is absent, no checkpoint, cut short or of another checksum; and
            for weights that do not fit, with the first tensors that are missing, unexpected or
            misshapen and the likely cause.
    """
    path = find_weights(source, sha256)
    parts = dict(_parts(_read(path)))
    if not parts:
        raise InputError(f"'{path}' is not a state dict (a mapping of names to tensors).")
    network.load_state_dict(_fitting(network, parts, path, part))


def find_weights(
    source: str | Path, sha256: str | None = None, expected: str | None = None
) -> Path:
    """Return the file that ``source`` means, downloaded if it is a URL; see :func:`load_weights`.

    Args:
        source: see there.
        sha256: see there.
        expected: name of the published file that it should be, for the message.

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
        path = _in_folder(path)
    if not path.is_file():
        raise InputError(_absent(str(source), expected or path.name))
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
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


def _in_folder(folder: Path) -> Path:
    """Return the one weights file of a folder, in ``unet/`` for a diffusers pipeline."""
    if (folder / "unet").is_dir():
        folder = folder / "unet"
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
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


def _parts(state: Any, label: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (dotted name, tensors by name) of every mapping of tensors in a checkpoint."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return
    if tensors := {k: v for k, v in state.items() if isinstance(v, Tensor)}:
        yield label, tensors
    if depth:
        for key, value in state.items():
            yield from _parts(value, f"{label}.{key}".lstrip("."), depth - 1)


def _fitting(
    network: nn.Module, parts: dict[str, dict[str, Tensor]], path: Path, part: str | None
) -> dict[str, Tensor]:
    """Return the tensors for ``network`` under its own names, from the one place they are in."""
    own = network.state_dict()
    # Every place that has at least one of the names, behind a prefix: (names in common, tensors).
    places: dict[str, tuple[int, dict[str, Tensor]]] = {}
    for label, tensors in parts.items():
        prefixes = Counter(
            prefix for name in tensors for prefix in _prefixes(name) if name[len(prefix) :] in own
        )
        for prefix, count in (prefixes or {"": 0}).items():
            inner = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            places[f"{label}.{prefix}".strip(".")] = (count, inner)
    if part is not None:
        if part not in places:
            raise InputError(
                f"'{path}' has no part '{part}' with tensors of the network; it has "
                f"{', '.join(repr(p) for p in list(places)[:5])}."
            )
        places = {part: places[part]}
    fits = [p for p, (_, inner) in places.items() if not any(_problems(own, inner).values())]
    if not fits:
        best = max(places, key=lambda p: (places[p][0], -len(p)))
        where = f" (its part '{best}')" if best else ""
        raise InputError(misfit(f"The weights '{path}'{where}", network, places[best][1]))
    first = places[fits[0]][1]
    others = [p for p in fits[1:] if any(not torch.equal(first[k], places[p][1][k]) for k in own)]
    if others:
        names = ", ".join(repr(p) for p in [fits[0], *others])
        raise InputError(
            f"'{path}' holds the network {1 + len(others)} times, as {names}: choose one by "
            "weights_part (an average, 'ema', is usually the better one)."
        )
    return first


def _prefixes(name: str) -> Iterator[str]:
    """Yield "", "a.", "a.b.", … of a dotted name."""
    yield ""
    for match in list(re.finditer(r"\.", name))[:6]:
        yield name[: match.end()]


def _problems(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshapen": [n for n in own if n in state and state[n].shape != own[n].shape],
    }


def misfit(what: str, network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return the sentence on ``state`` that does not fit: counts, first names, likely cause."""
    own = network.state_dict()
    problems = _problems(own, state)

    def text(kind: str, name: str) -> str:
        if kind != "misshapen":
            return name
        return f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"

    found = "; ".join(
        f"{len(names)} {kind} ({', '.join(text(kind, n) for n in names[:5])}"
        f"{', …' if len(names) > 5 else ''})"
        for kind, names in problems.items()
        if names
    )
    return f"{what} do not fit the network: {found}; {_cause(own, state, problems)}."


def _cause(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], problems: dict[str, list[str]]
) -> str:
    """Return the likely cause of a misfit, and what to change."""
    missing, unexpected, misshapen = problems.values()
    common = [name for name in own if name in state]
    strangers = missing + unexpected

    def ratio(name: str) -> float:
        """Output channels in the file relative to the network's, 0 if more than these differ."""
        there, here = state[name].shape, own[name].shape
        return there[0] / here[0] if here and there[1:] == here[1:] else 0.0

    if not common:
        return "no name agrees, so that they belong to another architecture"
    if any(re.search("label_emb|class_emb|map_label", name) for name in unexpected):
        return "they belong to a class-conditional network, and this one has no classes"
    if misshapen and not strangers and set(misshapen) <= set(list(own)[-2:]):
        if all(ratio(name) == 2 for name in misshapen):
            return (
                "they predict a variance as well (twice the output channels), so that the network "
                "needs learn_variance: true (diffusers: out_channels)"
            )
        if all(ratio(name) == 0.5 for name in misshapen):
            return (
                "they predict no variance (half the output channels), so that the network needs "
                "learn_variance: false (diffusers: out_channels)"
            )
    convolution = next((name for name in common if own[name].ndim == 4), None)
    if convolution in misshapen:
        there, here = state[convolution].shape, own[convolution].shape
        if there[0] == here[0] and there[1] != here[1]:
            return f"they are for images of {there[1]} channels and the network for {here[1]}"
    if misshapen and not strangers and all("emb_layers" in name for name in misshapen):
        return "they differ in scale_shift, whether the time embedding scales or is added"
    if len(strangers) > 10 and _blocks(own) != _blocks(state):
        return (
            "the network has another number of levels or of blocks per level (channel_mult, "
            "num_res_blocks)"
        )
    if 2 * len(misshapen) >= len(common):
        name = convolution if convolution in misshapen else misshapen[0]
        return (
            f"the network has another width: {name} has {state[name].shape[0]} channels in the "
            f"file and {own[name].shape[0]} here (model_channels, channel_mult)"
        )
    if any(re.search("qkv|attn|attention|to_q", name) for name in strangers):
        return "attention sits at other levels of the network (attention_levels)"
    return "the network's options must be those the weights were trained with"


def _blocks(names: Mapping[str, Tensor]) -> set[str]:
    """Return the names up to their first number, such as "input_blocks.3"."""
    return {match.group() for name in names if (match := re.match(r"\D*\d+", name))}
