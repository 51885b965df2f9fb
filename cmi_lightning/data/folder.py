"""A folder of clean images, to be degraded and restored."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from cmi_lightning.data.base import RestorationData
from cmi_lightning.data.files import (
    Channels,
    check_alike,
    check_at_least_1,
    check_num_workers,
    check_pixels,
    find_images,
    local_path,
    read_all,
    read_image,
    report_skipped,
)
from cmi_lightning.errors import InputError
from cmi_lightning.paths import printable

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {
    "fashion-mnist-test": ASSETS / "fashion_mnist_test",
    "fashion-mnist-table": ASSETS / "fashion_mnist_table",
    "fashion-mnist-validation": ASSETS / "fashion_mnist_validation",
    "photos-test": ASSETS / "photos" / "test",
    "photos-test-64": ASSETS / "photos" / "test-64",
    "photos-validation": ASSETS / "photos" / "validation",
    "photos-validation-64": ASSETS / "photos" / "validation-64",
}


class ImageFolder(Dataset):
    """Images of a folder as ``{"x": (C, H, W) in [−1, 1], "id": "sub/name"}``, all of one shape.

    Args:
        folder: see :class:`ImageFolderData`, as are the others.
        size: see there.
        channels: see there.
        limit: see there.
        strict: see there.

    Raises:
        InputError: see there; every file is decoded once here.
    """

    def __init__(
        self,
        folder: str,
        size: int | None = None,
        channels: Channels | None = None,
        limit: int | None = None,
        strict: bool = False,
    ) -> None:
        check_at_least_1({"data.size": size, "data.limit": limit})
        if size is not None:
            check_pixels(size, size, "data.size", "choose a smaller one")
        self.size, self.channels = size, channels
        path = SHIPPED[folder] if folder in SHIPPED else local_path(folder, "data.folder")
        files = dict(list(find_images(path, "data.folder").items())[:limit])
        # A restoration takes seconds an image and a decoding milliseconds, so that decoding all
        # of them first costs little and no bad file can stop a long run half-way.
        shapes, self.skipped = read_all(
            files.items(), lambda _, file: tuple(self._read(file).shape), strict, "data.folder"
        )
        self.files = [(name, files[name]) for name in shapes]
        check_alike(
            {printable(files[name]): shape for name, shape in shapes.items()},
            "data.folder",
            "set data.channels to 1, 3 or 4",
            "set data.size to resize them",
        )
        channels_, height, width = next(iter(shapes.values()))
        self.image_shape = (channels_, height, width)

    def _read(self, file: Path) -> Tensor:
        x = read_image(file, self.channels, "data.channels")
        if self.size is None:
            return x
        height, width = scaled(x, self.size)
        check_pixels(height, width, f"data.size on '{printable(file)}'", "crop that image")
        return crop_to(x, self.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        name, file = self.files[index]
        return {"x": self._read(file), "id": name}


def scaled(x: Tensor, size: int) -> tuple[int, int]:
    """Return (height, width) of x (C, H, W) with its shorter side brought to ``size``."""
    scale = size / min(x.shape[1:])
    return max(size, round(x.shape[1] * scale)), max(size, round(x.shape[2] * scale))


def crop_to(x: Tensor, size: int) -> Tensor:
    """Resize the shorter side of x (C, H, W) in [−1, 1] to ``size`` (antialiased bicubic) and crop.

    The crop (C, size, size) is the centre.
    """
    height, width = scaled(x, size)
    if x.shape[1:] != (height, width):
        x = F.interpolate(x[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return x[:, top : top + size, left : left + size]


class ImageFolderData(RestorationData):
    """Prediction batches of a folder of clean images, in natural order of their names.

    Subfolders are searched too; an image's id is its path in the folder, without suffix. Files are
    PNG, JPEG, BMP, TIFF or WebP, of 8 bits or (gray) 16.

    Args:
        folder: path of the folder, or images that ship with the package: "photos-test" (24
            landscapes, 256×192), "photos-test-64" (five crops of each, 64×64), "photos-validation"
            and "photos-validation-64" (16 others), "fashion-mnist-test" (64 garments, 32×32, gray).
        size: resize the shorter side to this many pixels (antialiased bicubic), then cut out the
            centre; None takes the images as they are.
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps what the files have.
        limit: restore only the first ``limit`` images.
        batch_size: images per batch.
        num_workers: worker processes of the loader.
        val_count: for ``fit``: the last ``val_count`` images are not trained on but validate.
        strict: refuse a folder with a file that cannot be decoded; else such files are reported,
            left out and listed in ``skipped``, {file: reason}.

    Raises:
        InputError: at set-up, before any sampling: for a missing or empty folder, one with no
            readable image (with ``strict``: with an unreadable one), mixed sizes without ``size``,
            mixed channel counts without ``channels``, two files of one id, or an option out of
            range.
    """

    def __init__(
        self,
        folder: str,
        size: int | None = None,
        channels: Channels | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        val_count: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.val_count, self.strict = val_count, strict
        self.folder, self.size, self.channels, self.limit = folder, size, channels, limit
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str) -> None:
        """Find and check the images."""
        check_at_least_1({"data.batch_size": self.batch_size})
        check_num_workers(self.num_workers)
        self.images = ImageFolder(self.folder, self.size, self.channels, self.limit, self.strict)
        if self.images.skipped != self.skipped:  # set-up runs twice: before and in the trainer
            report_skipped(self.images.skipped, len(self.images))
        self.skipped = self.images.skipped

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image, known after :meth:`setup`."""
        return self.images.image_shape

    def predict_dataloader(self) -> DataLoader:
        """The images to restore."""
        return self._loader(self.images)

    def train_dataloader(self) -> DataLoader:
        """All but the last ``val_count`` images, shuffled."""
        return self._loader(Subset(self.images, range(self._trained)), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The last ``val_count`` images."""
        return self._loader(Subset(self.images, range(self._trained, len(self.images))))

    @property
    def _trained(self) -> int:
        if not 0 <= self.val_count < len(self.images):
            raise InputError(
                f"data.val_count must leave images to train on: it is {self.val_count} of "
                f"{len(self.images)}."
            )
        return len(self.images) - self.val_count

    def _loader(self, images: Dataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            images, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers
        )
