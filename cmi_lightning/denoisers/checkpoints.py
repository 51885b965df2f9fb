"""Files of weights: what kind they are, and what they hold; no code in them is run."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cmi_lightning.errors import InputError, cause
from cmi_lightning.zoo.cards import published

FORMATS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def kind_of(path: Path) -> str:
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
        whole = start = 8 + int.from_bytes(head[:8], "little")
        if start <= size:
            try:
                with path.open("rb") as file:
                    header = json.loads(file.read(start)[8:])
                ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
                whole += max(ends, default=0)
            except (ValueError, AttributeError, KeyError, TypeError, IndexError):
                return "other"
        if whole > size:
            raise _cut_short(path, size, whole)
        return "safetensors"
    return "other"


def _cut_short(path: Path, size: int, whole: int | None) -> InputError:
    known = published(path.name)
    whole = whole or (known.size if known else None)
    of = f" of {whole:,}" if whole else ""
    return InputError(f"'{path}' is cut short (it has {size:,} bytes{of}): download it again.")


def read_checkpoint(path: Path) -> Any:
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
    kind = kind_of(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:
        held = re.search(r"GLOBAL (\S+) ", str(error))  # the class that PyTorch refuses to make
        reason = f"it holds objects of {held[1]}" if held else cause(error)
        raise InputError(
            f"Cannot read the weights '{path}' ({reason}); only plain tensors are loaded "
            "(weights_only=True): where you trust the file, load it yourself once and save the "
            "network's state_dict() as .safetensors."
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
