"""Square crops of photographs at random scales, to train a prior on."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cmi_lightning.checked import check
from cmi_lightning.data.files import local_path
from cmi_lightning.errors import InputError, printable
from cmi_lightning.paths import ASSETS

Split = Literal["train", "validation", "test"]
PHOTOGRAPHS = ASSETS / "photos" / "photographs.csv"


def crop(photo: Image.Image, x: int, y: int, side: int, size: int) -> Image.Image:
    """Return the square of ``side`` pixels whose corner is (x, y), resized to ``size`` pixels."""
    box = (x, y, x + side, y + side)
    return photo.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def five_squares(width: int, height: int) -> list[tuple[int, int, int]]:
    """Return (x, y, side) of both ends of a wide photograph and of three squares at its horizon."""
    half = height // 2
    across = (width // 12, (width - half) // 2, width - width // 12 - half)
    ends = [(0, 0, height), (width - height, 0, height)]
    return ends + [(x, int(0.4 * height), half) for x in across]


class _Crops(Dataset):
    """Crops of the photographs of one split, as ``{"x": (3, S, S) in [−1, 1], "id": …}``."""

    def __init__(self, data: PhotoCropsData, split: Split) -> None:
        self.data, self.split = data, split
        self.names = data.names(split)
        self.photos: dict[str, Image.Image] = {}

    def photo(self, name: str) -> Image.Image:
        """Return a photograph, decoded once."""
        if name not in self.photos:
            with Image.open(self.data.path / name) as opened:
                self.photos[name] = opened.convert("RGB")
        return self.photos[name]

    def __len__(self) -> int:
        return 5 * len(self.names)

    def square(self, index: int) -> tuple[str, tuple[int, int, int], bool]:
        """Return the photograph, (x, y, side) and whether to mirror, of crop number ``index``."""
        name = self.names[index // 5]
        return name, five_squares(*self.photo(name).size)[index % 5], False

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        name, (x, y, side), mirror = self.square(index)
        pixels = np.array(crop(self.photo(name), x, y, side, self.data.size))
        if mirror:
            pixels = pixels[:, ::-1].copy()
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        return {"x": image, "id": f"{Path(name).stem}/{index}"}


class _RandomCrops(_Crops):
    """Endless crops: number n is a function of (seed, n) alone, so a resumed run goes on."""

    def __len__(self) -> int:
        return self.data.crops_per_epoch

    def square(self, index: int) -> tuple[str, tuple[int, int, int], bool]:
        rng = np.random.default_rng([self.data.seed, index])
        name = self.names[rng.integers(len(self.names))]
        width, height = self.photo(name).size
        smallest, largest = self.data.smallest, min(self.data.largest, width, height)
        side = round(smallest * (largest / smallest) ** rng.random())
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return name, (x, y, side), bool(rng.random() < 0.5)


class _Numbers(Sampler[int]):
    """The numbers of an epoch's crops; Lightning calls ``set_epoch``."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.count, (self.epoch + 1) * self.count))


class PhotoCropsData(L.LightningDataModule):
    """Random crops of photographs for training, and five fixed ones of each for validation.

    A training crop is a square whose side is log-uniform in [``smallest``, ``largest``] pixels,
    anywhere in the photograph, mirrored half of the time, and resized to ``size`` pixels by
    Pillow's bicubic rule. The split is by photograph.

    Args:
        folder: folder of the photographs that ``photographs`` names.
        photographs: CSV with columns ``photo`` (file name) and ``split`` (train, validation or
            test); default: the list of the shipped prior ``photos-64``.
        size: side of the crops in pixels.
        smallest: smallest side in the photograph, in pixels.
        largest: largest side in the photograph, in pixels.
        crops_per_epoch: training crops that Lightning calls an epoch.
        batch_size: crops per batch.
        num_workers: worker processes of the loaders.
        seed: seed of the crops.

    Raises:
        InputError: if a photograph is missing or smaller than ``smallest``.
    """

    def __init__(
        self,
        folder: str,
        photographs: str | None = None,
        size: int = 64,
        smallest: int = 64,
        largest: int = 720,
        crops_per_epoch: int = 6400,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder, self.photographs, self.size = folder, photographs, size
        self.smallest, self.largest, self.seed = smallest, largest, seed
        self.crops_per_epoch, self.batch_size = crops_per_epoch, batch_size
        self.num_workers = num_workers

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every crop."""
        return 3, self.size, self.size

    def names(self, split: Split) -> list[str]:
        """Return the file names of a split's photographs."""
        table = Path(self.photographs) if self.photographs else PHOTOGRAPHS
        with open(table, newline="", encoding="utf-8") as file:
            names = [row["photo"] for row in csv.DictReader(file) if row["split"] == split]
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise InputError(
                f"data.folder: '{printable(self.path)}' lacks {len(missing)} of {len(names)} "
                f"photographs ('{printable(missing[0])}' is one); docs/photos.md says where to "
                "get them."
            )
        return names

    def setup(self, stage: str) -> None:
        """Find the photographs."""
        positive = dict.fromkeys(("batch_size", "size", "smallest", "crops_per_epoch"), "[1, inf)")
        check(self, "largest", "seed", label="data", num_workers="[0, inf)", **positive)
        if self.largest < self.smallest:
            raise InputError("data.largest must be at least data.smallest.")
        self.path = local_path(self.folder, "data.folder")
        self.train, self.validation = _RandomCrops(self, "train"), _Crops(self, "validation")

    def train_dataloader(self) -> DataLoader:
        """Random crops of the training photographs."""
        return DataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=_Numbers(self.crops_per_epoch),
            drop_last=True,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        """Five fixed crops of each validation photograph."""
        return DataLoader(self.validation, batch_size=40, num_workers=self.num_workers)
