"""Restored images as PNG files, and a side-by-side grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from torch import Tensor

from cmi_lightning.callbacks.base import SamplingCallback, log_image, output_folder
from cmi_lightning.callbacks.drawing import (
    apart,
    beside,
    path_of,
    save_png,
    tile,
    to_images,
    to_tile,
)
from cmi_lightning.paths import inside
from cmi_lightning.predict.module import PosteriorSampler, Restoration

WHITE_STD = 0.5  # the standard deviation, on [−1, 1], that a map shows as white


class ImageWriter(SamplingCallback):
    """Writes ``restored/<id>.png`` for every image, and ``grid.png``.

    Pixels are round(255·clamp((x + 1)/2, 0, 1)): clamped, never stretched to the full range. One
    channel gives a gray PNG, three RGB and four RGBA; of any other number, each channel becomes a
    gray ``<id>_c0.png``, ``<id>_c1.png``, …. With several draws of each image, ``restored/`` has
    their mean, ``draws/<id>/0.png`` and so on the draws, and ``std/<id>.png`` their standard
    deviation, black for 0 and white for 0.5 on [−1, 1] or more. With ``inputs``, ``truth/<id>.png``
    (where known) and ``measurement/<id>.png``, A⁺y, are written too, by the same rules.

    The grid shows truth (where known), measurement A⁺y and restoration of the first images, also in
    TensorBoard, and also after an error.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        grid_rows: images in the grid, ≥ 0; 0 for no grid.
        inputs: also write what was restored, and the truth.

    Raises:
        InputError: if a link in the folder leads out of it.
    """

    def __init__(
        self, dirpath: str | None = None, grid_rows: int = 16, inputs: bool = False
    ) -> None:
        self.dirpath, self.grid_rows, self.inputs = dirpath, grid_rows, inputs

    def recorded(self, trainer: L.Trainer, record: Mapping[str, Any]) -> bool:
        """Whether the sample's files are all there, its inputs' too if they are wanted."""
        folder, images = output_folder(trainer, self.dirpath), record.get("images", [])
        wanted = ["restored/", *(["measurement/"] if self.inputs else [])]
        return all(any(name.startswith(start) for name in images) for start in wanted) and all(
            (folder / name).is_file() for name in images
        )

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: PosteriorSampler,
        outputs: Restoration,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's PNGs, and a row for the grid of each image that it shall show."""
        folder = output_folder(trainer, self.dirpath)
        draws = outputs["draws"]
        shown = {
            "truth": outputs["truth"],
            "measurement": outputs["measurement"],
            "restored": outputs["restored"],
        }
        for i, (name, record) in enumerate(zip(outputs["id"], outputs["records"], strict=True)):
            written = _save(outputs["restored"][i], folder / "restored", name)
            if draws is not None:
                for k, x in enumerate(draws[i]):
                    written += _save(x, folder / "draws", f"{name}/{k}")
                spread = draws[i].std(0) / WHITE_STD * 2 - 1
                written += _save(spread, folder / "std", name)
            columns = {heading: x[i] for heading, x in shown.items() if x is not None}
            if self.inputs:
                for heading in [heading for heading in columns if heading != "restored"]:
                    written += _save(columns[heading], folder / heading, name)
            if pl_module.run.position(name) < self.grid_rows:
                save_png(beside([to_tile(x) for x in columns.values()]), self._row(folder, name))
                record["grid"] = list(columns)
            record["images"] = [path.relative_to(folder).as_posix() for path in written]

    @staticmethod
    def _row(folder: Path, name: str) -> Path:
        return inside(folder / "records", name, ".grid.png")

    def on_predict_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PosteriorSampler
    ) -> None:
        """Write the grid."""
        self._write_grid(trainer, pl_module.run.collect(trainer))

    def on_exception(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PosteriorSampler, exception: BaseException
    ) -> None:
        """Write the grid of what was finished."""
        self._write_grid(trainer, pl_module.run.collect(trainer, wait=False))

    def _write_grid(self, trainer: L.Trainer, records: list[dict[str, Any]]) -> None:
        folder = output_folder(trainer, self.dirpath)
        rows: list[list[Image.Image]] = []
        headings: list[str] = next((r["grid"] for r in records if "grid" in r), [])
        for record in records[: self.grid_rows] if trainer.is_global_zero else []:
            path = self._row(folder, record["id"])
            if record.get("grid") == headings and path.is_file():
                rows.append(apart(path, len(headings)))
        rows = [row for row in rows if row[0].size == rows[0][0].size]
        if rows:
            grid = tile(rows, headings)
            save_png(grid, folder / "grid.png")
            log_image(trainer, "grid", grid)


def _save(x: Tensor, folder: Path, name: str) -> list[Path]:
    """Write an image (C, H, W) in [−1, 1], and return its paths."""
    images = to_images(x)
    suffixes = [f"_c{i}" for i in range(len(images))] if len(images) > 1 else [""]
    paths = [path_of(folder, name + suffix) for suffix in suffixes]
    for path, image in zip(paths, images, strict=True):
        save_png(image, path)
    return paths
