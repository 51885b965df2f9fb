"""The files in which a run's folder keeps samples' features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmi_lightning.errors import InputError
from cmi_lightning.paths import inside


def embedding_path(folder: Path, name: str, embeddings: str = "embeddings") -> Path:
    """Return where a run's folder keeps a sample's features, by its id.

    The file is an array (2 + 1 + K, D): of the truth, the restoration, A⁺y, and, where there are
    several, the K draws.
    """
    return inside(folder / embeddings, name, ".npy")


def read_embeddings(folder: Path, ids: Sequence[str], embeddings: str = "embeddings") -> Tensor:
    """Return the features (N, 3 + K, D) that ``FeatureMetrics`` wrote for samples, in order.

    Raises:
        InputError: if a sample has none.
    """
    arrays = []
    for name in ids:
        path = embedding_path(folder, name, embeddings)
        try:
            arrays.append(np.load(path))
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise InputError(
                f"'{path}' is missing or damaged: run the same command again, with FeatureMetrics."
            ) from error
    return torch.from_numpy(np.stack(arrays))
