"""Image quality of restorations, per image and on average."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from cmi_lightning.callbacks.base import SamplingCallback, describe, output_folder, plain
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
    costs,
    given_up,
    print_table,
    statistics,
    table,
    timing,
)
from cmi_lightning.files import write, write_json
from cmi_lightning.paths import inside
from cmi_lightning.predict.module import PosteriorSampler, Restoration

STABLE_FID = 2048  # fewer images leave the covariance of Inception's 2048 features singular


class RestorationMetrics(SamplingCallback):
    """PSNR, SSIM, LPIPS and FID of restorations, and of the measurement seen as an image (A⁺y).

    All are computed on what a saved PNG holds: images clamped to [0, 1] and rounded to 8 bits, data
    range 1, never stretched. PSNR, SSIM and LPIPS are per image and then averaged. LPIPS and FID
    need pretrained networks; where these are not on disk, the summary says which file is missing
    and where to put it, and the metric is left out. Without ground truth only the residual
    ‖y − A x̂‖ of the (unclamped) restoration is reported. With several draws of an image, these are
    of their mean, "…_draws" of the draws, averaged, and FID of all draws. Samples that were given
    up are left out of the means, and listed.

    Writes ``metrics.csv``, a row per image (``sigma``: its noise level on [−1, 1], where images
    have their own), and ``summary.json``, with what the sampling cost in
    passes through the network; seconds and memory, which no two runs have alike, are in
    ``timing.json``. Sends the means to the trainer's loggers and prints a table.

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

    @property
    def networks(self) -> list[str]:
        """The feature networks at hand."""
        return [name for name, net in (("lpips", self._lpips), ("fid", self._fid)) if net]

    def recorded(self, trainer: L.Trainer, record: Mapping[str, Any]) -> bool:
        """Whether the sample's row is there, with all that can be had now."""
        if "metrics" not in record or not set(self.networks) <= set(record["networks"]):
            return False
        folder = output_folder(trainer, self.dirpath)
        return not record["features"] or self._features(folder, record["id"]).is_file()

    @staticmethod
    def _features(folder: Path, name: str) -> Path:
        return inside(folder / "features", name, ".npy")

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
        """Add the batch's rows to the records."""
        if not outputs["id"]:
            return
        columns: dict[str, Tensor] = {}
        features = None
        notes: dict[str, None] = {}
        if outputs["truth"] is None:
            notes["There is no ground truth: PSNR, SSIM, LPIPS and FID are left out."] = None
        else:
            truth, restored = levels(outputs["truth"]) / 255, levels(outputs["restored"]) / 255
            measured, draws = levels(outputs["measurement"]) / 255, outputs["draws"]
            each = [] if draws is None else [levels(x) / 255 for x in draws.unbind(1)]
            columns |= self._quality(restored, truth, "", notes)
            columns |= self._quality(measured, truth, "_measurement", notes)
            if each:
                many = [self._quality(x, truth, "_draws", notes) for x in each]
                columns |= {name: torch.stack([m[name] for m in many]).mean(0) for name in many[0]}
            if self._fid is not None and truth.shape[1] in (1, 3):
                shown = [truth, *(each or [restored])]
                features = torch.stack([self._inception(x) for x in shown], 1).cpu().numpy()
        columns["residual"] = outputs["residual"]
        columns["expected_residual"] = outputs["noise_norm"]
        values = {name: column.tolist() for name, column in columns.items()}
        folder, details = output_folder(trainer, self.dirpath), outputs["details"]
        for i, (name, record) in enumerate(zip(outputs["id"], outputs["records"], strict=True)):
            record["metrics"] = {key: plain(column[i]) for key, column in values.items()}
            record["networks"], record["notes"] = self.networks, list(notes)
            record["features"] = features is not None
            if features is not None:
                data = io.BytesIO()
                np.save(data, features[i])
                write(self._features(folder, name), data.getvalue())
            took = {
                "seconds": outputs["seconds"],
                "peak_memory": details.peak_memory,
                "batch": len(outputs["id"]),
                "device": str(pl_module.device),
            }
            write_json(inside(folder / "timings", name, ".json"), took)

    def _quality(
        self, x: Tensor, truth: Tensor, suffix: str, notes: dict[str, None]
    ) -> dict[str, Tensor]:
        """Return metrics (B,) of images in [0, 1] on the 8-bit grid, and note what is left out."""
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        columns: dict[str, Tensor] = {}
        channels, *size = truth.shape[1:]
        columns[f"psnr{suffix}"] = peak_signal_noise_ratio(
            x, truth, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )
        if min(size) >= SSIM_WINDOW:
            ssim = structural_similarity_index_measure(
                x, truth, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
            )
            columns[f"ssim{suffix}"] = torch.as_tensor(ssim).reshape(-1)
        else:
            notes[f"SSIM is left out: it needs {SSIM_WINDOW} pixels per side."] = None
        if not self.networks:
            return columns
        if channels not in (1, 3):
            only = f"LPIPS and FID are left out: they need 1 or 3 channels, not {channels}."
            notes[only] = None
            return columns
        if channels == 1:
            notes["LPIPS and FID see gray images with their channel repeated three times."] = None
        if self._lpips is not None and self.lpips is not None:
            if min(size) < (least := SMALLEST[self.lpips]):
                notes[f"LPIPS ({self.lpips}) is left out: it needs {least} pixels per side."] = None
            else:
                distance = self._lpips(rgb(x), rgb(truth), normalize=True)
                columns[f"lpips{suffix}"] = distance.reshape(-1)
        return columns

    def _inception(self, x: Tensor) -> Tensor:
        """Return the features (B, 2048) of images in [0, 1] on the 8-bit grid."""
        pixels = (x * 255).round().nan_to_num(0.0).to(torch.uint8)
        return self._fid.inception(rgb(pixels))

    def _fid_value(self, folder: Path, records: list[dict[str, Any]]) -> float | None:
        """Return FID of all samples that were not given up, and note how far to trust it."""
        used = [r for r in records if r.get("features") and not r["failed"]]
        if self._fid is None or len(used) < 2:
            return None
        if len(used) < STABLE_FID:
            self._note(
                f"FID of {len(used)} images is biased and unstable; use {STABLE_FID} or more."
            )
        self._fid.reset()
        for record in used:
            features = torch.from_numpy(np.load(self._features(folder, record["id"]))).double()
            for real, x in ((True, features[:1]), (False, features[1:])):
                kind = "real" if real else "fake"
                state = vars(self._fid)
                state[f"{kind}_features_sum"] += x.sum(0).to(self._fid.device)
                state[f"{kind}_features_cov_sum"] += (x.mT @ x).to(self._fid.device)
                state[f"{kind}_features_num_samples"] += len(x)
        # What update() would have set. All processes have read all features: nothing to exchange.
        self._fid.orig_dtype, self._fid._update_count = torch.float32, 1
        self._fid.sync_on_compute = False
        return float(self._fid.compute())

    def on_predict_epoch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PosteriorSampler
    ) -> None:
        """Write the summary, from the records of all processes and earlier runs."""
        records = [r for r in pl_module.run.collect(trainer) if "metrics" in r]
        folder = output_folder(trainer, self.dirpath)
        for note in dict.fromkeys(note for record in records for note in record["notes"]):
            self._note(note)
        fid = self._fid_value(folder, records)
        skipped = dict(getattr(trainer.datamodule, "skipped", None) or {})  # type: ignore[attr-defined]
        rows = self._rows(records)
        metrics, notes = statistics([row for row in rows if not row["failed"]])
        if fid is not None and math.isfinite(fid):
            metrics["fid"] = {"mean": fid, "standard_error": None, "count": len(rows)}
        failed = {record["id"]: record["failed"] for record in records if record["failed"]}
        summary: dict[str, Any] = {
            "images": len(rows),
            "failed": failed,
            "skipped": skipped,
            "metrics": metrics,
            "costs": costs(records),
            "notes": [*given_up(failed, len(rows), skipped), *self.notes, *notes],
            "protocol": self.protocol,
            "run": describe(pl_module),
        }
        self.result: dict[str, Any] = {**summary, "timing": timing(folder, records)}
        if rows and trainer.is_global_zero:
            write(folder / "metrics.csv", table(rows).encode())
            write_json(folder / "timing.json", self.result["timing"])
            write_json(folder / "summary.json", summary)

    @staticmethod
    def _rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "id": record["id"],
                **record["metrics"],
                **({"sigma": record["sigma"]} if "sigma" in record else {}),
                **{name: record[name] for name in ("forwards", "vjps", "second_order")},
                "failed": record["failed"] or "",
            }
            for record in records
        ]

    def on_exception(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PosteriorSampler, exception: BaseException
    ) -> None:
        """Write the rows of what was finished."""
        records = [r for r in pl_module.run.collect(trainer, wait=False) if "metrics" in r]
        if records and trainer.is_global_zero:
            folder = output_folder(trainer, self.dirpath)
            write(folder / "metrics.csv", table(self._rows(records)).encode())
            (folder / "summary.json").unlink(missing_ok=True)  # it was of other rows

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
