"""A folder of clean images, to be degraded and restored."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from cmi_lightning.data.files import (
    Channels,
    check_alike,
    check_at_least_1,
    find_images,
    read_image,
)
from cmi_lightning.errors import InputError

SHIPPED = {
    "fashion-mnist-test": Path(__file__).parent.parent / "assets" / "fashion_mnist_test",
}


class ImageFolder(Dataset):
    """Images of a folder as ``{"x": (C, H, W) in [−1, 1], "id": "sub/name"}``, all of one shape.

    Args:
        folder: see :class:`ImageFolderData`, as are the others.
        size: see there.
        channels: see there.
        limit: see there.

    Raises:
        InputError: see there; every file is decoded once here.
    """

    def __init__(
        self,
        folder: str,
        size: int | None = None,
        channels: Channels | None = None,
        limit: int | None = None,
    ) -> None:
        check_at_least_1({"data.size": size, "data.limit": limit})
        self.size, self.channels = size, channels
        path = SHIPPED.get(folder, Path(folder).expanduser())
        self.files = list(find_images(path, "data.folder").items())[:limit]
        # A restoration takes seconds an image and a decoding milliseconds, so that decoding all
        # of them first costs little and no bad file can stop a long run half-way.
        shapes = {str(file): tuple(self._read(file).shape) for _, file in self.files}
        check_alike(
            shapes, "data.folder", "set data.channels to 1, 3 or 4", "set data.size to resize them"
        )
        channels_, height, width = next(iter(shapes.values()))
        self.image_shape = (channels_, height, width)

    def _read(self, file: Path) -> Tensor:
        x = read_image(file, self.channels, "data.channels")
        return x if self.size is None else crop_to(x, self.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        name, file = self.files[index]
        return {"x": self._read(file), "id": name}


def crop_to(x: Tensor, size: int) -> Tensor:
    """Resize the shorter side of x (C, H, W) in [−1, 1] to ``size`` (antialiased bicubic) and crop.

    The crop (C, size, size) is the centre.
    """
    height, width = x.shape[1:]
    if min(height, width) != size:
        scale = size / min(height, width)
        height, width = (max(size, round(n * scale)) for n in (height, width))
        x = F.interpolate(x[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return x[:, top : top + size, left : left + size]


class ImageFolderData(L.LightningDataModule):
    """Prediction batches of a folder of clean images, in natural order of their names.

    Subfolders are searched too; an image's id is its path in the folder, without suffix. Files are
    PNG, JPEG, BMP, TIFF or WebP, of 8 bits or (gray) 16.

    Args:
        folder: path of the folder, or "fashion-mnist-test" for the 64 garments that ship with the
            package (32×32, gray).
        size: resize the shorter side to this many pixels (antialiased bicubic), then cut out the
            centre; None takes the images as they are.
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps what the files have.
        limit: restore only the first ``limit`` images.
        batch_size: images per batch.
        num_workers: worker processes of the loader.
        val_count: for ``fit``: the last ``val_count`` images are not trained on but validate.

    Raises:
        InputError: at set-up, before any sampling: for a missing or empty folder, a file that
            cannot be decoded, mixed sizes without ``size``, mixed channel counts without
            ``channels``, two files of one id, or an option below 1.
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
    ) -> None:
        super().__init__()
        self.val_count = val_count
        self.folder, self.size, self.channels, self.limit = folder, size, channels, limit
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str) -> None:
        """Find and check the images."""
        check_at_least_1({"data.batch_size": self.batch_size})
        self.images = ImageFolder(self.folder, self.size, self.channels, self.limit)

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
