"""The networks whose features compare images: AlexNet, VGG16 and Inception.

A network for :class:`cmi_lightning.callbacks.FeatureMetrics` is any module with ``features`` and
``embed``; these also know their published metric and find their weights.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmi_lightning import fetch
from cmi_lightning.denoisers.checkpoints import read_checkpoint
from cmi_lightning.errors import InputError, counted
from cmi_lightning.files import sha256


class Published(nn.Module):
    """A network with published weights, read when a run starts.

    Args:
        weights: a copy of the published file; default: torch.hub's cache.
        fetch: bring a missing file into that cache.
    """

    title: str  # in results
    metric: str  # what its published metric is called in notes
    keys: tuple[str | None, str, str]  # distance of images, Fréchet and kernel distance of sets
    source: fetch.MetricNetwork
    about: str  # what computes the metric
    smallest = 1  # pixels per side that leave something after the poolings
    file: Path | None = None  # the weights, once they are read

    def __init__(self, weights: str | None = None, fetch: bool = False) -> None:
        super().__init__()
        self.weights, self.fetch = weights, fetch
        self.notes: list[str] = []  # what has to be said about the weights
        self.network: Any = None

    def load(self, trainer: Any) -> None:
        """Read the weights; where they are missing, ``notes`` say so and ``network`` is None.

        Raises:
            InputError: if a file that was named is missing, or holds another network.
        """
        if self.fetch and trainer.world_size > 1:  # one process fetches, the others find
            if trainer.is_global_zero:
                self.source.locate(self.weights, fetch=True)
            trainer.strategy.barrier()
        path = self.source.locate(self.weights, self.fetch and trainer.world_size == 1)
        self.notes, self.network, self.file = [], None, None
        if isinstance(path, str):
            self.notes.append(path)
            return
        try:
            self.network = self.read(path).requires_grad_(False).eval()
        except ModuleNotFoundError as error:
            self.notes.append(
                f"{self.metric} is left out: the package {error.name} is not installed (pip "
                "install 'cmi-lightning[metrics]')."
            )
            return
        self.file, digest = path, sha256(path)
        names = [name for name in (self.source.file, self.source.converted) if name]
        if not digest.startswith(tuple(map(fetch.hash_start, names))):
            self.notes.append(
                f"{self.source.metric}: '{path}' is not the published {self.source.file} (SHA-256 "
                f"starts with {digest[:8]}); its numbers cannot be compared with others'."
            )

    def read(self, path: Path) -> Any:
        """Return the network with the weights of a file, or raise an InputError."""
        raise NotImplementedError

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Say why it does not take images (C, H, W); None if it does."""
        if shape[0] not in (1, 3):
            return f"1 or 3 channels are needed, not {shape[0]}."
        if min(shape[1:]) < self.smallest:
            return f"it needs {counted(self.smallest, 'pixel')} per side."
        return None


class _Lpips(Published):
    """LPIPS, by the package ``lpips``."""

    keys = ("lpips", "frechet", "kernel")
    net: str

    def read(self, path: Path) -> Any:
        """Return LPIPS with the linear layers of the lpips package and the backbone at ``path``."""
        import lpips

        self.about = f"lpips {version('lpips')}, {self.net}"
        state = _state(path, self.source)
        with warnings.catch_warnings():  # lpips calls torchvision by its old argument names
            warnings.simplefilter("ignore", UserWarning)
            metric = lpips.LPIPS(net=self.net, pnet_rand=True, verbose=False)
        try:
            # lpips cuts torchvision's "features.<i>" into "slice<k>.<i>".
            own = {
                key: state[f"features.{key.split('.', 1)[1]}"] for key in metric.net.state_dict()
            }
            metric.net.load_state_dict(own)
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"'{path}' does not hold the backbone of {self.metric}; it needs "
                f"{self.source.file}."
            ) from error
        return metric.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the five layers that LPIPS compares, of images (B, 1 or 3, H, W) in [0, 1]."""
        maps = self.network.net(self.network.scaling_layer(2 * rgb(x) - 1))
        return list(maps)

    def embed(self, x: Tensor) -> Tensor:
        """Return the last layer's mean over pixels (B, D)."""
        return self.features(x)[-1].mean((2, 3))

    def distance(self, x: Tensor, truth: Tensor) -> Tensor:
        """Return LPIPS (B,) of images (B, 1 or 3, H, W) in [0, 1]."""
        distance: Tensor = self.network(rgb(x), rgb(truth), normalize=True)
        return distance.reshape(-1)


class Alex(_Lpips):
    """AlexNet as LPIPS uses it: LPIPS of images, distances of sets in 256 features.

    Example:
        >>> Alex().title
        'AlexNet'
    """

    title, net, metric = "AlexNet", "alex", "LPIPS (alex)"
    smallest, source = 31, fetch.ALEX


class VGG(_Lpips):
    """VGG16 as LPIPS uses it: LPIPS of images, distances of sets in 512 features.

    Example:
        >>> VGG().keys
        ('lpips', 'frechet', 'kernel')
    """

    title, net, metric = "VGG16", "vgg", "LPIPS (vgg)"
    smallest, source = 16, fetch.VGG


class Inception(Published):
    """Inception as FID and KID use it, by the package ``torch-fidelity``.

    Example:
        >>> Inception().keys[1:]
        ('fid', 'kid')
    """

    title, metric, source = "Inception", "FID", fetch.INCEPTION
    keys = (None, "fid", "kid")
    about = "2048 features, restored against truth"

    def read(self, path: Path) -> Any:
        _state(path, self.source)  # torch-fidelity itself would unpickle anything
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            return FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise InputError(
                f"'{path}' does not hold Inception; FID needs {self.source.file}."
            ) from error

    def embed(self, x: Tensor) -> Tensor:
        """Return the 2048 features (B, D) of images (B, 1 or 3, H, W) in [0, 1], 8 bits."""
        pixels = (rgb(x) * 255).round().nan_to_num(0.0).to(torch.uint8)
        features: Tensor = self.network(pixels)[0]
        return features


def _state(path: Path, source: fetch.MetricNetwork) -> dict[str, Tensor]:
    try:
        state = read_checkpoint(path)
    except InputError as error:
        raise InputError(f"{source.metric}: {error} They come from {source.url}.") from error
    if not isinstance(state, dict):
        raise InputError(f"'{path}' is not a state dict; {source.metric} needs {source.file}.")
    return state


def rgb(x: Tensor) -> Tensor:
    """Repeat a gray image's channel: (B, 1 or 3, H, W) → (B, 3, H, W)."""
    return x.expand(-1, 3, -1, -1)
