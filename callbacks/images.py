"""Restored images as PNG files, and a side-by-side grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cmi_lightning.callbacks.base import RecordingCallback
from cmi_lightning.callbacks.drawing import encode_png, planes, to_tile
from cmi_lightning.checked import check
from cmi_lightning.files import write
from cmi_lightning.paths import inside
from cmi_lightning.predict.restoration import Restoration
from cmi_lightning.predict.restored import WHITE_STD


class ImageWriter(RecordingCallback):
    """Writes ``restored/<id>.png`` for every image, and ``grid.png``.

    Pixels are round(255·clamp((x + 1)/2, 0, 1)), or 65535 for 255: clamped, never stretched. One
    channel gives a gray PNG, three RGB and four RGBA; of any other number, each becomes a gray
    ``<id>_c0.png``, ``<id>_c1.png``, …. With several draws of each image, ``restored/`` has their
    mean, ``draws/<id>/0.png`` and so on the draws, and ``std/<id>.png`` their standard deviation,
    black for 0 and white for 0.5 on [−1, 1] or more. With ``inputs``, ``truth/<id>.png`` (if there
    is one) and ``measurement/<id>.png``, A⁺y, are written too.

    The grid shows truth, measurement A⁺y and restoration of the first images, in the loggers too.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        grid_rows: images in the grid, ≥ 0; 0 for no grid.
        inputs: also write what was restored, and the truth.
        bits: 8, or 16 for 65,536 levels; the grid always has 8, and metrics are computed on 8.

    Raises:
        InputError: if a link in the folder leads out of it.

    Example:
        >>> ImageWriter("out", bits=16).bits
        16
    """

    key = "images"

    def __init__(
        self,
        dirpath: str | None = None,
        grid_rows: int = 16,
        inputs: bool = False,
        bits: Literal[8, 16] = 8,
    ) -> None:
        super().__init__(dirpath)
        self.grid_rows, self.inputs, self.bits = grid_rows, inputs, bits
        check(self, "bits", grid_rows="[0, inf)")

    def files(self, record: Mapping[str, Any]) -> list[Path]:
        return [self.folder / name for name in record["images"]]

    def recorded(self, record: Mapping[str, Any]) -> bool:
        """Whether the sample's images are all there, as many and as fine as are wanted."""
        wanted = ["restored/", *(["measurement/"] if self.inputs else [])]
        return (
            super().recorded(record)
            and record.get("bits", 8) == self.bits
            and all(any(name.startswith(start) for name in record["images"]) for start in wanted)
        )

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        """Write the batch's PNGs, and a row for the grid of each image that it shall show."""
        draws = outputs["draws"]
        shown = {key: outputs[key] for key in ("truth", "measurement", "restored")}  # type: ignore[literal-required]
        entries = []
        for i, name in enumerate(outputs["id"]):
            columns = {heading: x[i] for heading, x in shown.items() if x is not None}
            written = self._save(outputs["restored"][i], "restored", name)
            if draws is not None:
                for k, x in enumerate(draws[i]):
                    written += self._save(x, "draws", f"{name}/{k}")
                written += self._save(draws[i].std(0) / WHITE_STD * 2 - 1, "std", name)
            for heading in [h for h in columns if self.inputs and h != "restored"]:
                written += self._save(columns[heading], heading, name)
            entry: dict[str, Any] = {"images": written}
            if self.bits != 8:
                entry["bits"] = self.bits
            if self.module.run.position(name) < self.grid_rows:
                row = {heading: to_tile(x) for heading, x in columns.items()}
                entry["grid"] = self.save_strip(name, "grid", row)
            entries.append(entry)
        return entries

    def _save(self, x: Tensor, folder: str, name: str) -> list[str]:
        """Write an image (C, H, W) in [−1, 1], and return its paths in the folder."""
        arrays = planes(x, self.bits)
        suffixes = [f"_c{i}" for i in range(len(arrays))] if len(arrays) > 1 else [""]
        paths = [inside(self.folder / folder, name + suffix, ".png") for suffix in suffixes]
        for path, pixels in zip(paths, arrays, strict=True):
            write(path, encode_png(pixels))
        return [path.relative_to(self.folder).as_posix() for path in paths]

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        self.write_strips(records[: self.grid_rows], "grid")
