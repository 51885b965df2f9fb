"""Batches of a folder's images: each of one shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader, default_collate

from cmi_lightning.checked import check
from cmi_lightning.data.base import RestorationData
from cmi_lightning.data.files import Shape, Survey, report
from cmi_lightning.denoisers.base import size_text
from cmi_lightning.errors import InputError


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

    images: Any = None  # a FolderFiles, after set-up
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
        check(self, label="data", batch_size="[1, inf)", num_workers="[0, inf)")
        plain = (str, int, float, bool, tuple)
        options = {name: value for name, value in vars(self).items() if type(value) in plain}
        if self._options != options:
            images = self.found()
            if images.survey[1:] != self.survey[1:]:
                told = images.survey.skipped, len(images), images.survey.notes
                rank_zero_only(report)(*told)
            self.images, self.survey, self.skipped = images, images.survey, images.survey.skipped
        self._options = None if self.trainer else options

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

    def first_of(self, shape: Shape) -> str:
        """Return the name of the first image of one of the shapes (C, H, W)."""
        read: dict[str, Shape] = self.survey.read
        kind = list(dict.fromkeys(read.values()))[self.image_shapes.index(shape)]
        return next(name for name, own in read.items() if own == kind)

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
