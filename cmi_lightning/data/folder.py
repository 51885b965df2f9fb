"""A folder of clean images, to be degraded and restored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from cmi_lightning.checked import check
from cmi_lightning.data.batches import FolderData
from cmi_lightning.data.files import FolderFiles, check_channels, check_pixels, local_path
from cmi_lightning.data.images import Channels, Note
from cmi_lightning.errors import InputError, printable
from cmi_lightning.paths import SHIPPED


class ImageFolder(FolderFiles):
    """Images of a folder as ``{"x": (C, H, W) in [−1, 1], "id": "sub/name"}``.

    Example:
        >>> ImageFolder(ImageFolderData("fashion-mnist-test", limit=2))[1]["id"]
        '00001'
    """

    key, option = "x", "data.folder"

    def __init__(self, data: ImageFolderData) -> None:
        check(data, label="data", size="[1, inf)", limit="[1, inf)", val_count="[0, inf)")
        if data.size is not None:
            check_pixels(data.size, data.size, "data.size", "choose a smaller one")
        self.size = data.size
        super().__init__(data, SHIPPED.get(data.folder) or local_path(data.folder, self.option))
        self.look()
        self.image_shapes = list(dict.fromkeys(self.shapes))
        shown = [printable(file) for _, file in self.files]
        check_channels(dict(zip(shown, self.shapes, strict=True)), self.option)

    def _read(self, file: Path, note: Note = bool) -> Tensor:
        x = super()._read(file, note)
        if self.size is None:
            return x
        height, width = scaled(x, self.size)
        check_pixels(height, width, f"data.size on '{printable(file)}'", "crop that image")
        return crop_to(x, self.size)


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
    return x[:, top : top + size, left : left + size].contiguous()


class ImageFolderData(FolderData):
    """Prediction batches of a folder of clean images, in natural order of their names.

    Subfolders are searched too; an image's id is its path in the folder, without suffix.
    :func:`cmi_lightning.data.images.read_image` says how files are read.

    Args:
        folder: path of the folder, or images that ship with the package: "photos-test" (24
            landscapes, 256×192), "photos-test-64" (five crops of each, 64×64), "photos-validation"
            and "photos-validation-64" (16 others), "fashion-mnist-test" (64 garments, 32×32, gray).
        size: resize the shorter side to this many pixels (antialiased bicubic), then cut out the
            centre; None takes the images as they are.
        channels: convert to 1 (gray), 3 (RGB) or 4 (RGBA) channels; None keeps what the files have.
        limit: restore only the first ``limit`` images.
        batch_size: images per batch; "auto" lets ``predict`` choose by measuring.
        num_workers: worker processes of the loader.
        val_count: for ``fit``: the last ``val_count`` images are not trained on but validate.
        strict: refuse a folder with a file that cannot be decoded; else such files are reported,
            left out and listed in ``skipped``, {file: reason}.
        background: colour behind transparent pixels, by name or as "rgb(255, 0, 0)".
        white_level: the number that is white in files of 16 or 32 bits, such as 4095; None: 65535.
        range: the numbers that are black and white in files of floating-point numbers.

    Raises:
        InputError: at set-up, before any sampling: for a missing or empty folder, one with no
            readable image (with ``strict``: with an unreadable one), mixed channel counts without
            ``channels``, two files of one id, or an option out of range. For ``fit`` also for mixed
            sizes without ``size``.

    Example:
        >>> data = ImageFolderData("fashion-mnist-test", limit=3, batch_size=2)
        >>> data.setup("predict")
        >>> next(iter(data.predict_dataloader()))["x"].shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        folder: str,
        size: int | None = None,
        channels: Channels | None = None,
        limit: int | None = None,
        batch_size: int | Literal["auto"] = 16,
        num_workers: int = 0,
        val_count: int = 0,
        strict: bool = False,
        background: str = "white",
        white_level: int | None = None,
        range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.size, self.channels, self.limit = folder, size, channels, limit
        self.batch_size, self.num_workers, self.val_count = batch_size, num_workers, val_count
        self.strict, self.background = strict, background
        self.white_level, self.range = white_level, range

    def found(self) -> ImageFolder:
        """Search and read the folder."""
        return ImageFolder(self)

    def train_dataloader(self) -> DataLoader:
        """All but the last ``val_count`` images, shuffled."""
        return self._loader(Subset(self.images, range(self._trained)), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The last ``val_count`` images."""
        return self._loader(Subset(self.images, range(self._trained, len(self.images))))

    @property
    def _trained(self) -> int:
        if self.val_count >= len(self.images):
            raise InputError(
                f"data.val_count must leave images to train on: it is {self.val_count} of "
                f"{len(self.images)}."
            )
        return len(self.images) - self.val_count

    def _loader(self, images: Dataset, shuffle: bool = False) -> DataLoader:
        _ = self.image_shape  # refuses images of several sizes
        return DataLoader(
            images, batch_size=self.per_batch, shuffle=shuffle, num_workers=self.num_workers
        )
