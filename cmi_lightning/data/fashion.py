"""Fashion-MNIST, padded to 32x32, as a Lightning data module."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from cmi_lightning.checked import check
from cmi_lightning.data.base import RestorationData
from cmi_lightning.data.files import local_path
from cmi_lightning.errors import InputError, printable

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
NUM_HELD_OUT = 1024  # the last training images: never trained on, used to choose step sizes


class FashionMNIST(Dataset):
    """One split of Fashion-MNIST as ``{"x": (1, 32, 32) in [−1, 1], "id": "test/00042"}``.

    Two black pixels are added on every side. Source: Xiao, Rasul & Vollgraf (2017), licence MIT.

    Args:
        train: the 60,000 training images, else the 10,000 test images.
        root: folder of the four ``*-ubyte.gz`` files. None takes the Debian package
            ``dataset-fashion-mnist`` where it is installed, else downloads through torchvision
            into ``~/.cache/cmi-lightning``.

    Raises:
        InputError: if ``root`` lacks the file, or it is damaged.

    Example:
        >>> import gzip, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     file = Path(root) / "t10k-images-idx3-ubyte.gz"
        ...     _ = file.write_bytes(gzip.compress(bytes(16 + 2 * 28 * 28)))
        ...     print(FashionMNIST(train=False, root=root)[1]["id"])
        test/00001
    """

    def __init__(self, train: bool, root: str | None = None) -> None:
        self.split = "train" if train else "test"
        name = f"{'train' if train else 't10k'}-images-idx3-ubyte.gz"
        folder = local_path(root, "data.root") if root else DEBIAN_FOLDER
        if not root and not (folder / name).is_file():
            folder = _download()
        if not (folder / name).is_file():
            raise InputError(
                f"No '{name}' in '{printable(folder)}': point data.root to Fashion-MNIST's files."
            )
        size = 16 + 28 * 28 * (60_000 if train else 10_000)
        try:
            with gzip.open(folder / name) as file:
                raw = file.read(size + 1)  # no more, whatever the file claims to hold
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"'{printable(folder / name)}' is damaged; fetch it again.") from error
        if len(raw) <= 16 or len(raw) > size or (len(raw) - 16) % (28 * 28):
            raise InputError(
                f"'{printable(folder / name)}' does not hold images of 28×28, {(size - 16) // 784} "
                "at most; fetch it again."
            )
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        self.pixels = F.pad(torch.from_numpy(pixels.copy()), (2, 2, 2, 2))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        x = self.pixels[index].float() / 127.5 - 1
        return {"x": x, "id": f"{self.split}/{index:05d}"}


def _download() -> Path:
    from torchvision.datasets import FashionMNIST as Source  # imported late: slow, seldom needed

    cache = Path("~/.cache/cmi-lightning").expanduser()
    try:
        Source(str(cache), download=True)
    except Exception as error:
        raise InputError(
            "Fashion-MNIST cannot be downloaded here; install the Debian package "
            "dataset-fashion-mnist or point data.root to a folder with its *-ubyte.gz files."
        ) from error
    return cache / "FashionMNIST" / "raw"


class FashionMNISTData(RestorationData):
    """Training, validation and prediction batches of Fashion-MNIST.

    The last 1,024 training images are held back from training: they are the validation set, and
    step sizes are chosen on them.

    Args:
        root: folder of the files; see :class:`FashionMNIST`.
        batch_size: images per batch.
        num_workers: worker processes of the loaders.
        predict_split: what ``predict`` restores: held-back training images or test images.
        limit: restore only the first ``limit`` images.

    Example:
        >>> FashionMNISTData(batch_size=8).image_shape
        (1, 32, 32)
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        predict_split: Literal["val", "test"] = "test",
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.predict_split, self.limit = predict_split, limit

    image_shape = (1, 32, 32)

    def setup(self, stage: str) -> None:
        """Read the files once per stage."""
        check(self, label="data", batch_size="[1, inf)", limit="[1, inf)", num_workers="[0, inf)")
        if stage in ("fit", "validate") or self.predict_split == "val":
            train = FashionMNIST(True, self.root)
            cut = len(train) - NUM_HELD_OUT
            if cut < 1:
                raise InputError(
                    f"data.root: {len(train)} training images are too few; the last {NUM_HELD_OUT} "
                    "are held out."
                )
            self.train, self.val = Subset(train, range(cut)), Subset(train, range(cut, len(train)))
        if stage in ("predict", "test"):
            full = self.val if self.predict_split == "val" else FashionMNIST(False, self.root)
            count = len(full) if self.limit is None else min(self.limit, len(full))
            self.predict = Subset(full, range(count))

    def _loader(self, dataset: Dataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,  # by name: Lightning rebuilds loaders from their arguments
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        """All training images but the held-back ones, shuffled."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The held-back training images."""
        return self._loader(self.val)

    def predict_dataloader(self) -> DataLoader:
        """The images to restore."""
        return self._loader(self.predict)
