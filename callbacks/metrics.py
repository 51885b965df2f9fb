"""Image quality of restorations, per image and on average."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from cmi_lightning.callbacks.base import SamplingCallback, describe, noise_norm, output_folder
from cmi_lightning.callbacks.drawing import levels
from cmi_lightning.callbacks.features import (
    BACKBONES,
    INCEPTION,
    SMALLEST,
    load_fid,
    load_lpips,
    provenance,
    rgb,
)
from cmi_lightning.callbacks.summary import (
    PROTOCOL,
    SSIM_WINDOW,
    append_rows,
    merge_fragments,
    print_table,
    read_rows,
    statistics,
)
from cmi_lightning.linalg import norm
from cmi_lightning.module import Restoration

STABLE_FID = 2048  # fewer images leave the covariance of Inception's 2048 features singular


class RestorationMetrics(SamplingCallback):
    """PSNR, SSIM, LPIPS and FID of restorations, and of the measurement seen as an image (A⁺y).

    All are computed on what a saved PNG holds: images clamped to [0, 1] and rounded to 8 bits, data
    range 1, never stretched. PSNR, SSIM and LPIPS are per image and then averaged. LPIPS and FID
    need pretrained networks; where these are not on disk, the summary says which file is missing
    and where to put it, and the metric is left out. Without ground truth only the residual
    ‖y − A x̂‖ of the (unclamped) restoration is reported.

    Writes ``metrics.csv``, a row per image as soon as its batch is done, and ``summary.json``;
    sends the means to the trainer's loggers and prints a table.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        lpips: backbone of LPIPS, or None to leave it out.
        fid: whether FID is wanted.
        lpips_weights: torchvision's checkpoint of the backbone (``alexnet-owt-7be5be79.pth`` or
            ``vgg16-397923af.pth``); default: torch.hub's cache.
        fid_weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; default:
            torch.hub's cache.
        fetch: download missing networks into torch.hub's cache.

    Raises:
        InputError: before sampling, if a weights file that was named is missing or another one.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        lpips: Literal["alex", "vgg"] | None = "alex",
        fid: bool = True,
        lpips_weights: str | None = None,
        fid_weights: str | None = None,
        fetch: bool = False,
    ) -> None:
        self.dirpath, self.lpips, self.fid = dirpath, lpips, fid
        self.lpips_weights, self.fid_weights, self.fetch = lpips_weights, fid_weights, fetch
        self._lpips: torch.nn.Module | None = None
        self._fid: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the feature networks, so that a wrong file stops the run before sampling."""
        if stage != "predict":
            return
        self._lpips = self._fid = None
        self.notes: dict[str, None] = {}  # an ordered set
        self.rows, self.fid_images = 0, 0
        self.protocol: dict[str, Any] = {**PROTOCOL, "torchmetrics": version("torchmetrics")}
        if self.lpips is not None:
            path = self._locate(trainer, BACKBONES[self.lpips], self.lpips_weights)
            if path is not None:
                self._lpips = load_lpips(self.lpips, path)
                name, note = provenance(path, BACKBONES[self.lpips])
                self.protocol["lpips"] = f"lpips {version('lpips')}, {self.lpips}, {name}"
                self._note(note)
        if self.fid:
            path = self._locate(trainer, INCEPTION, self.fid_weights)
            if path is not None:
                self._fid = load_fid(path)
                name, note = provenance(path, INCEPTION)
                self.protocol["fid"] = f"2048 features of {name}, restored against truth"
                self._note(note)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the feature networks to the module's device, known only now."""
        for network in filter(None, (self._lpips, self._fid)):
            network.to(pl_module.device)

    def _locate(self, trainer: L.Trainer, weights: Any, given: str | None) -> Path | None:
        if trainer.world_size > 1:  # one process fetches, the others find
            if trainer.is_global_zero:
                weights.locate(given, self.fetch)
            trainer.strategy.barrier()
        found = weights.locate(given, self.fetch and trainer.world_size == 1)
        if isinstance(found, str):
            self._note(found)
            return None
        return found

    def _note(self, text: str | None) -> None:
        if text is not None:
            self.notes[text] = None

    @torch.no_grad()
    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Restoration,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the batch's rows to ``metrics.csv``."""
        columns: dict[str, Tensor] = {}
        if outputs["truth"] is None:
            self._note("There is no ground truth: PSNR, SSIM, LPIPS and FID are left out.")
        else:
            columns |= self._quality(
                levels(outputs["restored"]) / 255,
                levels(outputs["measurement"]) / 255,
                levels(outputs["truth"]) / 255,
            )
        problem, record = outputs["details"].problem, outputs["details"].record
        columns["residual"] = norm(problem.y - problem.operator(outputs["restored"]))
        columns["expected_residual"] = noise_norm(problem)
        values = {name: column.tolist() for name, column in columns.items()}
        rows: list[dict[str, Any]] = [
            {
                "id": name,
                **{key: column[i] for key, column in values.items()},
                "seconds": float(outputs["seconds"]),
                "forwards": record.forwards,
                "vjps": record.vjps,
            }
            for i, name in enumerate(outputs["id"])
        ]
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = output_folder(trainer, self.dirpath) / f"metrics{rank}.csv"
        if self.rows == 0:  # a summary of an earlier run would not belong to these rows
            path.with_name("summary.json").unlink(missing_ok=True)
        append_rows(path, rows, new=self.rows == 0)
        self.rows += len(rows)

    def _quality(self, restored: Tensor, measured: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Return metrics (B,) of images in [0, 1] on the 8-bit grid."""
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        columns: dict[str, Tensor] = {}
        channels, *size = truth.shape[1:]
        for suffix, x in {"": restored, "_measurement": measured}.items():
            columns[f"psnr{suffix}"] = peak_signal_noise_ratio(
                x, truth, data_range=1.0, reduction="none", dim=(1, 2, 3)
            )
            if min(size) >= SSIM_WINDOW:
                ssim = structural_similarity_index_measure(
                    x, truth, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
                )
                columns[f"ssim{suffix}"] = torch.as_tensor(ssim).reshape(-1)
            else:
                self._note(f"SSIM is left out: it needs {SSIM_WINDOW} pixels per side.")
        if self._lpips is None and self._fid is None:
            return columns
        if channels not in (1, 3):
            self._note(f"LPIPS and FID are left out: they need 1 or 3 channels, not {channels}.")
            return columns
        if channels == 1:
            self._note("LPIPS and FID see gray images with their channel repeated three times.")
        if self._lpips is not None and self.lpips is not None:
            if min(size) < (least := SMALLEST[self.lpips]):
                self._note(f"LPIPS ({self.lpips}) is left out: it needs {least} pixels per side.")
            else:
                for suffix, x in {"": restored, "_measurement": measured}.items():
                    distance = self._lpips(rgb(x), rgb(truth), normalize=True)
                    columns[f"lpips{suffix}"] = distance.reshape(-1)
        if self._fid is not None:
            self._fid.update(rgb((truth * 255).round().to(torch.uint8)), real=True)
            x = (restored * 255).round().nan_to_num(0.0).to(torch.uint8)
            self._fid.update(rgb(x), real=False)
            self.fid_images += len(x)
        return columns

    def _fid_value(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
        """Return FID, on every process at once, and note how far to trust it."""
        if self._fid is None:
            return None
        count = torch.tensor(self.fid_images, device=pl_module.device)
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        if 0 < total < STABLE_FID:
            self._note(f"FID of {total} images is biased and unstable; use {STABLE_FID} or more.")
        return float(self._fid.compute()) if total > 1 else None

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary."""
        fid = self._fid_value(trainer, pl_module)
        path = output_folder(trainer, self.dirpath) / "metrics.csv"
        if trainer.world_size > 1:
            merge_fragments(trainer, path)
        rows = read_rows(path) if self.rows or trainer.world_size > 1 else []
        metrics, notes = statistics(rows)
        if fid is not None and math.isfinite(fid):
            metrics["fid"] = {"mean": fid, "standard_error": None, "count": len(rows)}
        self.result: dict[str, Any] = {
            "images": len(rows),
            "metrics": metrics,
            "notes": [*self.notes, *notes],
            "protocol": self.protocol,
            "run": describe(pl_module),
        }
        if rows and trainer.is_global_zero:
            text = json.dumps(self.result, indent=2, ensure_ascii=False, allow_nan=False)
            path.with_name("summary.json").write_text(text + "\n", encoding="utf-8")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means and print the table, after any progress bar has gone."""
        if not self.result["images"] or not trainer.is_global_zero:
            return
        means = {
            f"metrics/{name}": value["mean"]
            for name, value in self.result["metrics"].items()
            if value["mean"] is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(means, 0)  # self.log is refused in predict
        print_table(self.result, output_folder(trainer, self.dirpath))
