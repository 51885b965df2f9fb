"""Pretrained feature networks of LPIPS and FID: found on disk, or said to be missing."""

from __future__ import annotations

import hashlib
import os
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmi_lightning.errors import InputError

TIMEOUT = 5.0  # seconds without a byte after which a download is given up


@dataclass(frozen=True)
class Weights:
    """A published weights file.

    Attributes:
        metric: what it is for.
        file: its name; the part after the last "-" is the start of its SHA-256.
        url: where the package that uses it gets it from.
        option: the option of ``RestorationMetrics`` that points to a copy.
    """

    metric: str
    file: str
    url: str
    option: str

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file

    def locate(self, given: str | None, fetch: bool) -> Path | str:
        """Return the file's path, or one line that says what is missing and where to put it.

        Raises:
            InputError: if ``given`` is not a file.
        """
        if given is not None:
            path = Path(given).expanduser()
            if not path.is_file():
                raise InputError(f"{self.option}: there is no file '{path}'.")
            return path
        if self.cached.is_file():
            return self.cached
        tried = ""
        if fetch:
            try:
                _download(self.url, self.cached, self.hash_start)
                return self.cached
            except Exception as error:  # any failure leaves the metric out, with its reason
                reason = str(error).splitlines()[0] if str(error) else ""
                tried = f" (download failed: {type(error).__name__}: {reason})"
        return (
            f"{self.metric} is left out: its network {self.file} is not on this machine{tried}. "
            f"Get {self.url} and put it at {self.cached}, or point the option {self.option} to it"
            f"{'' if fetch else ', or set fetch: true'}."
        )

    @property
    def hash_start(self) -> str:
        """The start of the file's SHA-256, as its name tells."""
        return Path(self.file).stem.rsplit("-", 1)[1]


ALEX = Weights(
    "LPIPS",
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "lpips_weights",
)
VGG = Weights(
    "LPIPS",
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "lpips_weights",
)
INCEPTION = Weights(
    "FID",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "fid_weights",
)
BACKBONES = {"alex": ALEX, "vgg": VGG}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels per side that leave something after the poolings


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, hash_start: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as source, temporary.open("wb") as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)
        if not _sha256(temporary).startswith(hash_start):
            raise OSError("the file that came is not the published one (SHA-256 differs)")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, weights: Weights) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"Cannot read the {weights.metric} weights '{path}' ({type(error).__name__}); get "
            f"{weights.url} again."
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"'{path}' is not a state dict; {weights.metric} needs {weights.file}.")
    return state


def provenance(path: Path, weights: Weights) -> tuple[str, str | None]:
    """Return "file sha256:…" for the protocol, and a note where it is not the published file."""
    digest = _sha256(path)
    note = None
    if not digest.startswith(weights.hash_start):
        note = (
            f"{weights.metric}: '{path}' is not the published {weights.file} (SHA-256 starts with "
            f"{digest[:8]}); its numbers cannot be compared with others'."
        )
    return f"{path.name} sha256:{digest[:16]}", note


def load_lpips(net: str, path: Path) -> nn.Module:
    """Return LPIPS with the linear layers of the lpips package and the backbone at ``path``.

    Raises:
        InputError: if the file is not that backbone.
    """
    import lpips

    state = _read(path, BACKBONES[net])
    with warnings.catch_warnings():  # lpips calls torchvision by its old argument names
        warnings.simplefilter("ignore", UserWarning)
        metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    try:
        # lpips cuts torchvision's "features.<i>" into "slice<k>.<i>".
        own = {key: state[f"features.{key.split('.', 1)[1]}"] for key in metric.net.state_dict()}
        metric.net.load_state_dict(own)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"'{path}' does not hold the backbone of LPIPS ({net}); it needs {BACKBONES[net].file}."
        ) from error
    return metric.requires_grad_(False).eval()


def load_fid(path: Path) -> Any:
    """Return torchmetrics' FID on torch-fidelity's Inception at ``path``, resized as it does.

    Raises:
        InputError: if the file is not that network.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _read(path, INCEPTION)  # torch-fidelity itself would unpickle anything
    try:
        return FrechetInceptionDistance(feature_extractor_weights_path=str(path), antialias=False)
    except RuntimeError as error:
        raise InputError(
            f"'{path}' does not hold Inception; FID needs {INCEPTION.file}."
        ) from error


def rgb(x: Tensor) -> Tensor:
    """Repeat a gray image's channel: (B, 1 or 3, H, W) → (B, 3, H, W)."""
    return x.expand(-1, 3, -1, -1)
