"""Distances between restored and true images in the features of a small network of one's own."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from cmi_lightning.callbacks.base import SamplingCallback, describe, output_folder, plain
from cmi_lightning.callbacks.classifier import WEIGHTS, shipped_classifier
from cmi_lightning.callbacks.distances import frechet, kernel, perceptual
from cmi_lightning.callbacks.drawing import levels
from cmi_lightning.callbacks.summary import given_up, statistics
from cmi_lightning.errors import InputError, first_line
from cmi_lightning.files import write, write_json
from cmi_lightning.paths import inside
from cmi_lightning.predict.module import PosteriorSampler, Restoration

FEW = 10  # images per feature below which a covariance is poorly known
KINDS = ("", "_measurement", "_draws")  # of the restoration, of A⁺y, of the single draws


# Files -------------------------------------------------------------------------------------------


def embedding_path(folder: Path, name: str) -> Path:
    """Return where a run's folder keeps a sample's features, by its id.

    The file is an array (2 + 1 + K, D): of the truth, the restoration, A⁺y, and, where there are
    several, the K draws.
    """
    return inside(folder / "embeddings", name, ".npy")


def read_embeddings(folder: Path, ids: Sequence[str]) -> Tensor:
    """Return the features (N, 3 + K, D) that :class:`FeatureMetrics` wrote for samples, in order.

    Raises:
        InputError: if a sample has none.
    """
    arrays = []
    for name in ids:
        path = embedding_path(folder, name)
        try:
            arrays.append(np.load(path))
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise InputError(
                f"'{path}' is missing or damaged: run the same command again, with FeatureMetrics."
            ) from error
    return torch.from_numpy(np.stack(arrays))


# Callback ----------------------------------------------------------------------------------------


class FeatureMetrics(SamplingCallback):
    """Perceptual, Fréchet and kernel distance in the features of a network for these images.

    For images on which LPIPS and FID mean nothing, such as small gray ones. The numbers are none of
    theirs and cannot be compared with them, only with each other. Everything is computed on what a
    saved PNG holds, images clamped to [0, 1] and rounded to 8 bits, of the restoration and of the
    measurement seen as an image (A⁺y, "…_measurement"). With several draws of an image the
    restoration is their mean, and "…_draws" are of the draws: the perceptual distance averaged over
    them, the others of all of them. Samples that were given up are left out. Without ground truth,
    or for images that the network does not take, all is left out, and a note says so.

    Writes the pooled features of every image to ``embeddings/<id>.npy`` (:func:`embedding_path`)
    and the means to ``features.json``.

    Args:
        network: a module with ``features(x)``, a list of feature maps (B, C, H, W) of images x
            (B, C, H, W) in [0, 1], and ``embed(x)``, pooled features (B, D); and, if it only takes
            some images, their ``image_shape`` (C, H, W), with None where any size will do. Default:
            the shipped classifier of Fashion-MNIST.
        name: what the network is called in the results; default: its class's name.
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        name: str | None = None,
        dirpath: str | None = None,
    ) -> None:
        self.network, self.name, self.dirpath = network, name, dirpath

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the network."""
        if stage != "predict":
            return
        shipped = self.network is None
        self._network: Any = shipped_classifier() if shipped else self.network.eval()  # type: ignore[union-attr]
        default = "garment classifier" if shipped else type(self._network).__name__
        self.title = self.name or default
        self.about: dict[str, Any] = {"name": self.title}
        if shipped:
            self.about["file"] = WEIGHTS.name
            self.about["sha256"] = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        else:
            self.about["class"] = type(self._network).__qualname__
            self.about["sha256"] = _checksum(self._network)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the network to the module's device, known only now."""
        self._network.to(pl_module.device)

    def recorded(self, trainer: L.Trainer, record: Mapping[str, Any]) -> bool:
        """Whether the sample's distances are there, of this network, and its features."""
        if record.get("perceptual_network") != self.about["sha256"]:
            return False
        path = embedding_path(output_folder(trainer, self.dirpath), record["id"])
        return not record["perceptual"] or path.is_file()

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
        """Add the distances to the records, and write the features."""
        folder, draws = output_folder(trainer, self.dirpath), outputs["draws"]
        for i, (name, record) in enumerate(zip(outputs["id"], outputs["records"], strict=True)):
            record["perceptual_network"] = self.about["sha256"]
            record["perceptual"], record["perceptual_notes"] = {}, []
            if outputs["truth"] is None:
                note = f"There is no ground truth: the distances of {self.title} are left out."
                record["perceptual_notes"].append(note)
                continue
            restored, measured = outputs["restored"][i], outputs["measurement"][i]
            each = None if draws is None else draws[i]
            try:  # a sample at a time, so that its numbers do not depend on its batch
                distances, features = self.numbers(outputs["truth"][i], restored, measured, each)
            except Exception as error:  # a metric is no reason to lose a run
                note = f"The distances of {self.title} are left out: {first_line(error)}"
                record["perceptual_notes"].append(note)
                continue
            record["perceptual"] = {key: plain(value) for key, value in distances.items()}
            data = io.BytesIO()
            np.save(data, features.cpu().numpy())
            write(embedding_path(folder, name), data.getvalue())

    def numbers(
        self, truth: Tensor, restored: Tensor, measurement: Tensor, draws: Tensor | None
    ) -> tuple[dict[str, float], Tensor]:
        """Return a sample's distances to the truth, and the features (3 + K, D) of all.

        Args:
            truth: (C, H, W) in [−1, 1], as are the others; beyond it they are clamped.
            restored: (C, H, W).
            measurement: A⁺y (C, H, W).
            draws: (K, C, H, W), or None.

        Raises:
            InputError: for images that the network does not take.
        """
        shown = [truth, restored, measurement, *([] if draws is None else draws)]
        x = levels(torch.stack(shown)) / 255
        wanted = getattr(self._network, "image_shape", None)
        given = tuple(x.shape[1:])
        if wanted and any(w is not None and w != n for w, n in zip(wanted, given, strict=True)):
            sizes = ("×".join("any" if n is None else str(n) for n in s) for s in (wanted, given))
            raise InputError("it takes images of {} and these are {}.".format(*sizes))
        first = next(self._network.parameters(), x)
        x = x.to(first.dtype)
        maps, features = self._network.features(x), self._network.embed(x)
        if features.shape[:1] != x.shape[:1] or features.ndim != 2:
            raise InputError(f"embed gave {tuple(features.shape)} for {len(x)} images, not (B, D).")
        apart = perceptual([m[1:] for m in maps], [m[:1].expand_as(m[1:]) for m in maps]).tolist()
        distances = {"perceptual": apart[0], "perceptual_measurement": apart[1]}
        if apart[2:]:
            distances["perceptual_draws"] = math.fsum(apart[2:]) / len(apart[2:])
        return distances, features.float()

    def on_predict_epoch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PosteriorSampler
    ) -> None:
        """Write ``features.json``, from the records of all processes and earlier runs."""
        records = [r for r in pl_module.run.collect(trainer) if "perceptual" in r]
        folder = output_folder(trainer, self.dirpath)
        if not records or not trainer.is_global_zero:
            return
        used = [r for r in records if r["perceptual"] and not r["failed"]]
        failed = {r["id"]: r["failed"] for r in records if r["failed"]}
        notes = dict.fromkeys(note for r in records for note in r["perceptual_notes"])
        metrics, odd = statistics([r["perceptual"] for r in used])
        if len(used) > 1:
            embeddings = read_embeddings(folder, [r["id"] for r in used])
            count, dimension = len(used), embeddings.shape[2]
            self.about["features"] = dimension
            metrics |= distances_of_sets(embeddings)
            if count < FEW * dimension:
                notes[
                    f"The Fréchet distance of {count} images in {dimension} features is too large, "
                    "the more so the fewer images: compare it between equal numbers of images only."
                ] = None
        self.result: dict[str, Any] = {
            "images": len(records),
            "failed": failed,
            "metrics": metrics,
            "labels": labels(self.title),
            "network": self.about,
            "notes": [*given_up(failed, len(records), {}), *notes, *odd],
            "protocol": {
                "pixels": "clamped to [0, 1] and rounded to 8 bits, as saved",
                "perceptual": "Zhang et al. (2018), Eq. 1 with w = 1, averaged over layers; "
                "per image, then averaged. Not LPIPS: another network, no learned weights",
                "frechet": f"torchmetrics {version('torchmetrics')}, restored against truth, "
                "pooled features. Not FID: another network",
                "kernel": f"torchmetrics {version('torchmetrics')}, kernel (x·y/D + 1)³, unbiased, "
                "all images at once. Not KID: another network. Restorations go in pairs with "
                "their truths, which lowers it",
            },
            "run": describe(pl_module),
        }
        write_json(folder / "features.json", self.result)

    def on_exception(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PosteriorSampler, exception: BaseException
    ) -> None:
        """Remove the means of an earlier run, which were of other samples."""
        if trainer.is_global_zero and pl_module.run.collect(trainer, wait=False):
            (output_folder(trainer, self.dirpath) / "features.json").unlink(missing_ok=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        result = getattr(self, "result", None)
        if result is None or not trainer.is_global_zero:
            return
        means = {
            f"metrics/{name}": value["mean"]
            for name, value in result["metrics"].items()
            if value["mean"] is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(means, 0)


def labels(network: str) -> dict[str, str]:
    """Return what the metrics are called in the features of a network of that name."""
    return {
        "perceptual": f"perceptual distance ({network})",
        "frechet": f"Fréchet distance ({network} features)",
        "kernel": f"kernel distance ({network} features)",
    }


def distances_of_sets(embeddings: Tensor) -> dict[str, dict[str, Any]]:
    """Return Fréchet and kernel distance to the truth, as entries of a summary's ``metrics``.

    Args:
        embeddings: (N, 3 + K, D), see :func:`read_embeddings`; N ≥ 2.
    """
    found: dict[str, dict[str, Any]] = {}
    truth = embeddings[:, 0]
    for i, kind in enumerate(KINDS, start=1):
        fake = embeddings[:, i] if i < 3 else embeddings[:, 3:].flatten(0, 1)
        if not len(fake) or not (fake.isfinite().all() and truth.isfinite().all()):
            continue
        for name, distance in (("frechet", frechet), ("kernel", kernel)):
            value = distance(truth, fake)
            found[f"{name}{kind}"] = {
                "mean": plain(value) if math.isfinite(value) else None,
                "standard_error": None,
                "count": len(embeddings),
            }
    return found


def _checksum(network: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors, by name, type and shape."""
    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        flat = value.detach().cpu().contiguous().reshape(-1)
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
