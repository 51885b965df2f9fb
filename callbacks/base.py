"""The base of the callbacks that keep something of every sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from cmi_lightning.callbacks.drawing import apart, beside, save_png, tile
from cmi_lightning.callbacks.loggers import log_image, log_options, log_values
from cmi_lightning.errors import InputError, counted
from cmi_lightning.files import claim, read_json, remove, write_json
from cmi_lightning.paths import inside
from cmi_lightning.predict.callback import SamplingCallback
from cmi_lightning.predict.module import Restoration


class RecordingCallback(SamplingCallback):
    """Measures every sample, and makes something of all of them.

    A subclass says what to measure and to write. When, for which samples and to which loggers is
    said here, once. The records of all samples hold those of earlier runs and other processes too.

    Attributes:
        key: the field of a sample's record by which it is known to be measured.
        summary: name of the file that :meth:`summarise` fills; None for none.
        folder, trainer, module: where it writes, and what it watches; known from ``prepare`` on.
        result: what ``summarise`` returned, on the first process.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.

    Example:
        >>> class Brightness(RecordingCallback):
        ...     key, summary = "brightness", "brightness.json"
        ...     def measure(self, outputs):
        ...         return [{"brightness": float(x.mean())} for x in outputs["restored"]]
        ...     def summarise(self, records):
        ...         return {"mean": sum(r["brightness"] for r in records) / len(records)}
        >>> Brightness().recorded({"id": "a", "brightness": 0.2})
        True
    """

    key: str
    summary: str | None = None
    folder: Path
    trainer: Any
    module: Any
    result: dict[str, Any]

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    def prepare(self) -> None:
        """Refuse what cannot work, before sampling."""

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        """Return what is added to each sample's record, and write the sample's files."""
        raise NotImplementedError

    def files(self, record: Mapping[str, Any]) -> list[Path]:
        """Return the files that a sample has, by its record."""
        return []

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Write files of several samples; also of those that were finished before an error."""

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what is to be said of all samples."""
        return {}

    def logged(self) -> Iterable[tuple[int, dict[str, float]]]:
        """Return what the loggers get of the result: steps and values."""
        return ()

    def show(self) -> None:
        """Print the result, after any progress bar has gone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            self.trainer, self.module = trainer, pl_module
            self.folder, self.result = output_folder(trainer, self.dirpath), {}
            self.prepare()

    def recorded(self, record: Mapping[str, Any]) -> bool:
        """Whether a sample was measured and its files are all there."""
        return self.key in record and all(path.is_file() for path in self.files(record))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a foreign summary; send the run's options to the loggers, one callback for all."""
        if self.summary is not None and trainer.is_global_zero:
            claim(self.folder / self.summary)
        first = next((c for c in trainer.callbacks if isinstance(c, RecordingCallback)), None)  # type: ignore[attr-defined]
        if self is first and (folder := self.module.run.folder) is not None:
            log_options(trainer, read_json(folder / "run.json"))

    @torch.no_grad()
    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        entries = self.measure(outputs) if outputs["id"] else []
        if len(entries) != len(outputs["records"]) or any("id" in entry for entry in entries):
            raise InputError(
                f"{type(self).__name__}.measure must return a dictionary for each of "
                f"{counted(len(outputs['records']), 'sample')}, none of them with an id."
            )
        for record, entry in zip(outputs["records"], entries, strict=True):
            record.update(entry)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what is made of all samples."""
        records = self._collect()
        if records and trainer.is_global_zero:
            self.write(records)
            self.result = self.summarise(records)
            if self.summary is not None:
                write_json(self.folder / self.summary, self.result)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write what was finished, and remove a summary, which was of other samples."""
        records = self._collect(wait=False) if hasattr(self, "module") else []
        if records and trainer.is_global_zero:
            self.write(records)
            if self.summary is not None:
                remove(self.folder / self.summary)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and print the result."""
        if self.result and trainer.is_global_zero:
            for step, values in self.logged():
                log_values(trainer, values, step)
            self.show()

    def strip(self, name: str, field: str) -> Path:
        """Return where a sample's row of pictures is kept, until all are laid out together."""
        return inside(self.folder / "records", name, f".{field}.png")

    def save_strip(self, name: str, field: str, pictures: Mapping[str, Image.Image]) -> list[str]:
        """Keep a sample's row of pictures, and return their headings."""
        save_png(beside(list(pictures.values())), self.strip(name, field))
        return list(pictures)

    def write_strips(self, records: Sequence[Mapping[str, Any]], field: str) -> None:
        """Write ``<field>.png`` of the samples whose rows are like the first one's, and log it."""
        headings: list[str] = next((r[field] for r in records if field in r), [])
        alike = [self.strip(r["id"], field) for r in records if r.get(field) == headings]
        rows = [apart(path, len(headings)) for path in alike if path.is_file()]
        if rows:
            picture = tile(rows, headings)
            save_png(picture, self.folder / f"{field}.png")
            log_image(self.trainer, field, picture)

    def _collect(self, wait: bool = True) -> list[dict[str, Any]]:
        return [r for r in self.module.run.collect(self.trainer, wait=wait) if self.key in r]

    @property
    def skipped(self) -> dict[str, str]:
        """Input files that could not be read, with the reason."""
        return dict(getattr(self.trainer.datamodule, "skipped", None) or {})


def output_folder(trainer: L.Trainer, dirpath: str | None) -> Path:
    """Return ``dirpath``, or the trainer's ``default_root_dir``."""
    return Path(dirpath or trainer.default_root_dir).expanduser()


def plain(value: float) -> float | str:
    """Return six digits of a number, or its name where JSON has none."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def failures(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return why samples were given up, by id."""
    return {record["id"]: record["failed"] for record in records if record["failed"]}
