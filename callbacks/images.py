"""Restored images as PNG files, and a side-by-side grid."""

from __future__ import annotations

from typing import Any

import lightning as L
from PIL import Image

from cmi_lightning.callbacks.base import SamplingCallback, log_image, output_folder
from cmi_lightning.callbacks.drawing import path_of, save_png, tile, to_images, to_tile
from cmi_lightning.module import Restoration


class ImageWriter(SamplingCallback):
    """Writes ``restored/<id>.png`` for every image, and ``grid.png``.

    Pixels are round(255·clamp((x + 1)/2, 0, 1)): clamped, never stretched to the full range. One
    channel gives a gray PNG, three RGB and four RGBA; of any other number, each channel becomes a
    gray ``<id>_c0.png``, ``<id>_c1.png``, …. The grid shows truth (where known), measurement A⁺y
    and restoration of the first images, also in TensorBoard, and also after an error.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        grid_rows: images in the grid, ≥ 0; 0 for no grid.

    Raises:
        InputError: if a sample id leads out of the folder.
    """

    def __init__(self, dirpath: str | None = None, grid_rows: int = 16) -> None:
        self.dirpath, self.grid_rows = dirpath, grid_rows
        self.rows: list[list[Image.Image]] = []
        self.headings: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self.rows, self.headings = [], []

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Restoration,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's PNGs, and keep its images for the grid while there is room."""
        folder = output_folder(trainer, self.dirpath) / "restored"
        for name, x in zip(outputs["id"], outputs["restored"], strict=True):
            images = to_images(x)
            suffixes = [f"_c{i}" for i in range(len(images))] if len(images) > 1 else [""]
            for suffix, image in zip(suffixes, images, strict=True):
                save_png(image, path_of(folder, name + suffix))
        shown = {
            "truth": outputs["truth"],
            "measurement": outputs["measurement"],
            "restored": outputs["restored"],
        }
        columns = {heading: x for heading, x in shown.items() if x is not None}
        if not self.headings:
            self.headings = list(columns)
        if list(columns) == self.headings:
            missing = self.grid_rows - len(self.rows)
            for i in range(min(len(outputs["id"]), missing)):
                self.rows.append([to_tile(x[i]) for x in columns.values()])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the grid."""
        self._write_grid(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write the grid of what was finished."""
        self._write_grid(trainer)

    def _write_grid(self, trainer: L.Trainer) -> None:
        size = self.rows[0][0].size if self.rows else None
        rows = [row for row in self.rows if row[0].size == size]
        self.rows = []
        if rows and trainer.is_global_zero:
            grid = tile(rows, self.headings)
            save_png(grid, output_folder(trainer, self.dirpath) / "grid.png")
            log_image(trainer, "grid", grid)
