"""What is known of a public prior: its network, its file, its licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmi_lightning.errors import InputError
from cmi_lightning.paths import ASSETS


@dataclass(frozen=True)
class File:
    """A public file of weights: what it must be, and where its authors published it.

    Attributes:
        name: the name it is published under.
        size: bytes; None where nobody has told them.
        sha256: of the file, or None.
        url: a direct download, or the authors' page that links to one.
        other_names: names that others give to the same file.
    """

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None
    other_names: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"{self.size:,} bytes"] if self.size else []
        told += [f"SHA-256 {self.sha256}"] if self.sha256 else []
        return f"{self.name} ({', '.join(told)}) from {self.url}".replace(" () ", " ")

    @property
    def direct(self) -> bool:
        """Whether the address is the file's own."""
        return self.url.endswith(self.name)


@dataclass(frozen=True)
class Card:
    """A prior of the zoo.

    Its network is ``network``, a class of ours (``UNet``) or of diffusers with its arguments; its
    weights are one of ``asset`` (in the package), ``file`` and ``repo`` (of the Hugging Face hub).

    Attributes:
        name: what :func:`cmi_lightning.zoo.load_prior` is told.
        title: what its images are.
        image_shape: (C, H, W), with None where any size will do.
        parameters: of the network that is sampled, without an autoencoder.
        licence: of the weights.
        source: who made it: authors, year, page.
        network: class and arguments.
        prediction: see :class:`cmi_lightning.denoisers.NetworkDenoiser`.
        schedule: name of its levels.
        trained_side: see :class:`cmi_lightning.denoisers.Denoiser`.
        needs: conditions that it must be told, such as ("y",).
        asset: path in the package's assets.
        file: the published file.
        repo: "owner/name".

    >>> card("ffhq-256").parameters
    93563910
    """

    name: str
    title: str
    image_shape: tuple[int | None, ...]
    parameters: int
    licence: str
    source: str
    network: dict[str, Any]
    prediction: str = "epsilon"
    schedule: str = "linear"
    trained_side: int | None = None
    needs: tuple[str, ...] = ()
    asset: str | None = None
    file: File | None = None
    repo: str | None = None

    @property
    def path(self) -> Path | None:
        """The file that ships with the package."""
        return ASSETS / self.asset if self.asset else None

    @property
    def size(self) -> str:
        """Size of the download, for people; in float32 where nobody has told it."""
        if self.path:
            return f"{self.path.stat().st_size / 1e6:.0f} MB"
        if self.file and self.file.size:
            return f"{self.file.size / 1e6:.0f} MB"
        return f"about {4e-6 * self.parameters:.0f} MB"

    @property
    def origin(self) -> str:
        """Where it comes from."""
        if self.repo:
            return f"https://huggingface.co/{self.repo}"
        return self.file.url if self.file else "ships with the package"


def _cards() -> dict[str, Card]:
    found = {}
    text = Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8")
    for name, given in yaml.safe_load(text).items():
        if name.startswith("_"):  # parts that others are made of
            continue
        if file := given.pop("file", None):
            file["other_names"] = tuple(file.get("other_names", ()))
            given["file"] = File(**file)
        shape = tuple(given.pop("image_shape"))
        found[name] = Card(name, image_shape=shape, needs=tuple(given.pop("needs", ())), **given)
    return found


CARDS = _cards()
"""The cards by name."""


def shipped() -> dict[str, Path]:
    """Return the weights that ship with the package, by name."""
    return {name: card.path for name, card in CARDS.items() if card.path}


def published(name: str) -> File | None:
    """Return the public file of a name."""
    files = [card.file for card in CARDS.values() if card.file]
    return next((f for f in files if name in (f.name, *f.other_names)), None)


def card(name: str) -> Card:
    """Return the card of a name, or of a repository on the hub.

    Raises:
        InputError: for another name.
    """
    for known in CARDS.values():
        if name.removeprefix("hf://") in (known.name, known.repo):
            return known
    raise InputError(
        f"There is no prior '{name}': use {', '.join(CARDS)}; or a folder that save_pretrained "
        "wrote; or hf://owner/name of the Hugging Face hub."
    )
