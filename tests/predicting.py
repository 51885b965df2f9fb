"""Quiet predictions through Lightning, and what they leave."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmi_lightning.callbacks import SamplingCallback, SamplingProgress
from cmi_lightning.cli import main


def items(x: Iterable[Tensor], given: bool = False, ids: Sequence[str] | None = None) -> list[dict]:
    """Images as a data set's items, with ids of a folder; ``given``: as measurements."""
    key = "y_image" if given else "x"
    return [{key: v, "id": ids[i] if ids else f"set/{i}"} for i, v in enumerate(x)]


def trainer(folder: Path | None, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A trainer on the CPU that shows nothing but what a callback shows."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": folder,
        "enable_progress_bar": any(isinstance(c, SamplingProgress) for c in callbacks),
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**(quiet | options), callbacks=list(callbacks))


def restore(
    folder: Path | None,
    module: Any,
    data: list[dict] | L.LightningDataModule,
    *callbacks: L.Callback,
    batch_size: int = 3,
    **options: Any,
) -> list[Any]:
    """Restore a data set's items, or what a data module has."""
    loader = DataLoader(data, batch_size) if isinstance(data, list) else data
    return trainer(folder, *callbacks, **options).predict(module, loader)


def crash() -> None:
    raise RuntimeError("crash")


class Watch(SamplingCallback):
    """Keeps what callbacks are shown of the sampled batches; acts at a step of one of them."""

    def __init__(self, at: tuple[int, int] | None = None, then: Callable = crash) -> None:
        self.batches: list[list[str]] = []
        self.records: list[Any] = []
        self.outputs: list[dict] = []
        self.at, self.then = at, then

    def on_sampling_start(self, trainer, pl_module, ids, problem):
        self.batches.append(list(ids))

    def on_sampling_step(self, trainer, pl_module, record):
        self.records.append(record)
        if self.at == (len(self.batches) - 1, record.index):
            self.then()

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.outputs.append(outputs)

    def joined(self, key: str) -> Tensor:
        return torch.cat([output[key] for output in self.outputs])


def cli(command: str, *options: str) -> int:
    """The exit code of a command, whose words are parted by spaces, with further options."""
    return main([*command.split(), *options])


def ready(data: Any) -> Any:
    """A data module, set up for prediction."""
    data.setup("predict")
    return data


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but for those that tell the time or the folder's name."""
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    other = ("timing", "events.out", "config.yaml")
    return {name: p.read_bytes() for name, p in names.items() if not name.startswith(other)}


def strict_json(path: Path) -> dict[str, Any]:
    """Read a file that must be strict JSON: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
