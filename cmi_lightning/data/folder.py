"""A folder of clean images, to be degraded and restored."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, default_collate

from cmi_lightning.data.base import RestorationData
from cmi_lightning.data.files import (
    Kept,
    Shape,
    Survey,
    check_channels,
    check_least,
    check_pixels,
    find_images,
    local_path,
    read_all,
    report,
)
from cmi_lightning.data.images import Channels, Decoding, Note, read_image
from cmi_lightning.denoisers.base import size_text
from cmi_lightning.errors import InputError, printable
from cmi_lightning.paths import SHIPPED


class ImageFolder(Dataset):
    """Images of a folder as ``{"x": (C, H, W) in [−1, 1], "id": "sub/name"}``.

    Every file is decoded at construction, so that no bad file can stop a long run half-way, and the
    first GiB of images is kept: a run decodes each of them once.

    Args:
        data: the options, and what they may be: :class:`ImageFolderData`.

    Raises:
        InputError: as :class:`ImageFolderData` has it.

    Example:
        >>> ImageFolder(ImageFolderData("fashion-mnist-test", limit=2))[1]["id"]
        '00001'
    """

    def __init__(self, data: ImageFolderData) -> None:
        check_least(1, size=data.size, limit=data.limit)
        if data.size is not None:
            check_pixels(data.size, data.size, "data.size", "choose a smaller one")
        self.size = data.size
        self.how = Decoding(data.channels, data.background, data.white_level, data.range)
        self.read = Kept(self._read)
        known = data.folder in SHIPPED
        path = SHIPPED[data.folder] if known else local_path(data.folder, "data.folder")
        found, passed = find_images(path, "data.folder", data.strict)
        files = dict(list(found.items())[: data.limit])
        self.survey = read_all(files, self._measure, data.strict, "data.folder")
        self.survey.notes.extend(passed)
        self.files = [(name, files[name]) for name in self.survey.read]
        self.shapes = list(self.survey.read.values())
        self.image_shapes = list(dict.fromkeys(self.shapes))
        shown = [printable(file) for _, file in self.files]
        check_channels(dict(zip(shown, self.shapes, strict=True)), "data.folder")

    def _measure(self, _: str, file: Path, note: Note) -> Shape:
        channels, height, width = self.read(file, note=note).shape
        return channels, height, width

    def _read(self, file: Path, note: Note = bool) -> Tensor:
        x = read_image(file, self.how, note)
        if self.size is None:
            return x
        height, width = scaled(x, self.size)
        check_pixels(height, width, f"data.size on '{printable(file)}'", "crop that image")
        return crop_to(x, self.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        name, file = self.files[index]
        return {"x": self.read(file), "id": name}


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


class BatchesOfOneShape(BatchSampler):
    """Batches of items that can be stacked: all of the first item's shape, then the next one's.

    >>> list(BatchesOfOneShape(range(4), 2, shapes=[(8, 8), (9, 9), (8, 8), (8, 8)]))
    [[0, 2], [3], [1]]

    Args:
        sampler: the order of the items.
        batch_size: items in a batch, at most.
        drop_last: leave out batches of fewer.
        shapes: of each item, what all items of a batch must share.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        shapes: Sequence[Hashable] = (),
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)  # type: ignore[arg-type]
        self.shapes = shapes

    @property
    def _groups(self) -> Iterable[BatchSampler]:
        groups: dict[Hashable, list[int]] = {}
        for index in self.sampler:
            groups.setdefault(self.shapes[index], []).append(index)
        return [BatchSampler(group, self.batch_size, self.drop_last) for group in groups.values()]

    def __iter__(self) -> Iterator[list[int]]:
        return chain.from_iterable(self._groups)

    def __len__(self) -> int:
        return sum(map(len, self._groups))


class FolderData(RestorationData):
    """What data modules of folders share: they read all files at set-up, and report once.

    Images of one size make a batch. Results keep the order of the names.

    Attributes:
        at_once: images per batch, chosen by the sampler where ``batch_size`` is "auto".
    """

    images: Any = None
    survey: Survey = Survey({}, {}, [])
    batch_size: int | Literal["auto"]
    num_workers: int
    at_once: int | None = None
    _options: dict[str, Any] | None = None  # of what was set up before the trainer came

    def found(self) -> Any:
        """Search and read the folder, and return its images."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Find and check the images, and report on them: once, before or in the trainer."""
        check_least(1, batch_size=None if self.batch_size == "auto" else self.batch_size)
        check_least(0, num_workers=self.num_workers)
        names = inspect.signature(type(self)).parameters
        options = {name: getattr(self, name) for name in names}
        before, self._options = self._options, None if self.trainer else options
        if before == options:
            return
        images = self.found()
        if images.survey[1:] != self.survey[1:]:
            told = images.survey.skipped, len(images), images.survey.notes
            rank_zero_only(report)(*told)
        self.images, self.survey, self.skipped = images, images.survey, images.survey.skipped

    @property
    def ids(self) -> list[str]:
        """The images' names, in the order of the results."""
        return [name for name, _ in self.images.files]

    @property
    def image_shapes(self) -> list[Shape]:
        """The different (C, H, W) of the images, known after set-up."""
        return self.images.image_shapes

    @property
    def image_shape(self) -> Shape | None:
        """(C, H, W) of every image, known after set-up.

        Raises:
            InputError: if there are several.
        """
        shapes = self.image_shapes
        if len(shapes) > 1:
            raise InputError(
                f"data: one size of images is needed here, and there are {len(shapes)}, such as "
                f"{size_text(shapes[0][1:])} and {size_text(shapes[1][1:])} (height×width); set "
                "data.size to resize them."
            )
        return shapes[0] if shapes else None

    @property
    def per_batch(self) -> int:
        """Images per batch.

        Raises:
            InputError: if nothing has chosen it yet.
        """
        size = self.at_once if self.batch_size == "auto" else self.batch_size
        if size is None:
            raise InputError(
                "data.batch_size=auto is chosen by PosteriorSampler when it predicts: give a "
                "number here."
            )
        return size

    @property
    def most_alike(self) -> int:
        """How many images there are of the shape that most have."""
        return max(Counter(self.images.shapes).values())

    def some(self, count: int) -> dict[str, Any]:
        """Return a batch of ``count`` of the largest images, in turn where they are fewer."""
        shapes = self.images.shapes
        largest = max(shapes, key=math.prod)
        chosen = islice(cycle(i for i, shape in enumerate(shapes) if shape == largest), count)
        return default_collate([{**self.images[i], "id": f"{k}"} for k, i in enumerate(chosen)])

    def predict_dataloader(self) -> DataLoader:
        """The images to restore."""
        places, shapes = range(len(self.images)), self.images.shapes
        batches = BatchesOfOneShape(places, self.per_batch, shapes=shapes)
        return DataLoader(self.images, batch_sampler=batches, num_workers=self.num_workers)


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
        if not 0 <= self.val_count < len(self.images):
            raise InputError(
                f"data.val_count must leave images to train on: it is {self.val_count} of "
                f"{len(self.images)}."
            )
        return len(self.images) - self.val_count

    def _loader(self, images: Dataset, shuffle: bool = False) -> DataLoader:
        assert self.image_shape is not None  # refuses several
        return DataLoader(
            images, batch_size=self.per_batch, shuffle=shuffle, num_workers=self.num_workers
        )
