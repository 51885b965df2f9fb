"""The zoo: its cards, the networks that they describe, where weights come from."""

import hashlib
import re
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from cmi_lightning.cli import main
from cmi_lightning.denoisers import NetworkDenoiser, UNet
from cmi_lightning.errors import InputError
from cmi_lightning.files import download
from cmi_lightning.zoo import CARDS, card, load_prior
from cmi_lightning.zoo.command import on_disk

# What the authors say, and the last digit that they give.
PUBLISHED = {
    "ffhq-256": (93_563_910, 1),  # counted on the published file
    "imagenet-256": (552_814_086, 1),
    "imagenet-64": (296e6, 1e6),  # Dhariwal & Nichol (2021), Table 11
    "imagenet-128": (422e6, 1e6),
    "ddpm-cifar10-32": (35.7e6, 1e5),  # Ho et al. (2020), Appendix B
    "ddpm-celebahq-256": (114e6, 1e6),
    "ldm-celebahq-256": (274e6, 1e6),  # Rombach et al. (2022), Table 12
    "sd3-medium": (2e9, 1e8),  # Esser et al. (2024)
}


@pytest.mark.parametrize("name", CARDS)
def test_architectures_have_the_published_number_of_parameters(name):
    known = card(name)
    options = dict(known.network)
    kind = options.pop("class")
    if kind != "UNet":
        diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = UNet(**options) if kind == "UNet" else getattr(diffusers, kind)(**options)
    count = sum(p.numel() for p in network.parameters())
    assert count == known.parameters
    if name in PUBLISHED:
        said, digit = PUBLISHED[name]
        assert abs(count - said) < digit
    elif name.startswith("ddpm"):
        assert known.network == card("ddpm-celebahq-256").network
    else:
        assert known.path is not None
        assert NetworkDenoiser(UNet(**options), str(known.path))  # strictly


def test_cards_say_where_and_under_what_licence():
    for name, known in CARDS.items():
        assert known.name == name
        assert known.licence
        assert known.source
        assert sum(x is not None for x in (known.asset, known.file, known.repo)) == 1
        assert known.origin
        if known.file and known.file.size:  # torch.save adds names and alignment
            assert 0 < known.file.size - 4 * known.parameters < 600_000
    assert len({known.repo or known.name for known in CARDS.values()}) == len(CARDS)


def test_the_table_of_priors(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    Path("imagenet256.pt").touch()
    assert main(["priors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(CARDS)
    row = {line.split()[0]: line for line in lines}
    assert re.search("yes +ships with the package", row["photos-64"])
    assert re.search("3×256×256 +93.6 M .* no, 374 MB +https://drive", row["ffhq-256"])
    assert re.search("yes +https://openaipublic", row["imagenet-256"])
    assert "https://huggingface.co/google/ddpm-cat-256" in row["ddpm-cat-256"]
    assert main(["priors", "all"]) == 2
    assert not on_disk(card("sd3-medium"))


def test_our_own_folders(tmp_path):
    network = UNet(1, 32, (1,), attention_levels=(), num_classes=3)
    NetworkDenoiser(network, None, condition={"y": 1}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="must be told y"):
        load_prior(str(tmp_path))
    back = load_prior(str(tmp_path), condition={"y": 2})
    assert back.condition == {"y": 2}


def test_offline_the_file_its_size_and_its_address_are_named(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=r"no route.*256x256_diffusion_uncond.pt \(2,211,383"):
        load_prior("imagenet-256")
    with pytest.raises(InputError, match=r"ffhq_10m.pt \(374,417,833 bytes.*drive.google.com"):
        load_prior("ffhq-256")
    with pytest.raises(InputError, match=r"huggingface.co/google/ddpm-cat-256 \(about 455 MB\)"):
        load_prior("ddpm-cat-256")


def test_a_download_goes_on_and_is_checked(tmp_path, monkeypatch):
    content = bytes(range(256)) * 40
    asked = []

    class Answer:
        def __init__(self, start: int, end: int) -> None:
            self.status, self.data = (206 if start else 200), content[start:end]
            self.headers = {"Content-Length": str(len(content) - start)}

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def read(self, size):
            part, self.data = self.data[:size], self.data[size:]
            return part

    def open_(request, timeout):
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        asked.append(start)
        if start == len(content):
            raise HTTPError(request.full_url, 416, "Range Not Satisfiable", {}, None)
        return Answer(start, 5000 if len(asked) == 1 else len(content))

    monkeypatch.setattr("urllib.request.urlopen", open_)
    path, start = tmp_path / "net.pt", hashlib.sha256(content).hexdigest()[:8]
    with pytest.raises(OSError, match="ended after 5,000 bytes"):
        download("https://example.org/net.pt", path)
    assert not path.exists()
    with pytest.raises(OSError, match="SHA-256 differs"):
        download("https://example.org/net.pt", path, "0")
    assert asked == [0, 5000]
    assert list(tmp_path.iterdir()) == []
    asked.clear()
    with pytest.raises(OSError, match="ended after 5,000 bytes"):
        download("https://example.org/net.pt", path, start)
    assert download("https://example.org/net.pt", path, start) == path
    assert asked == [0, 5000]
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [content]
    path.rename(tmp_path / ".net.pt.part")  # killed when all had come
    assert download("https://example.org/net.pt", path, start) == path
    assert asked == [0, 5000, len(content), 0]
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [content]


def test_hub_files_are_checked_against_the_hubs_checksum(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    # The cache of the hub: snapshots link to files named by their SHA-256.
    blob = tmp_path / "blobs" / ("0" * 64)
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_bytes(b"other content")
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    with pytest.raises(InputError, match="has not the SHA-256 that the hub has of it"):
        load_prior("hf://someone/model")
