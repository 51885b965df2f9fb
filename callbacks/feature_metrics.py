"""Distances between restored and true images in the features of a network."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from cmi_lightning.callbacks.base import RecordingCallback, failures, plain
from cmi_lightning.callbacks.classifier import GarmentClassifier
from cmi_lightning.callbacks.distances import (
    embedding_path,
    frechet,
    kernel,
    perceptual,
    read_embeddings,
)
from cmi_lightning.callbacks.networks import Published
from cmi_lightning.callbacks.summary import given_up, means, statistics
from cmi_lightning.data.pictures import levels
from cmi_lightning.errors import InputError, counted, first_line
from cmi_lightning.files import sha256, write
from cmi_lightning.paths import safe_name
from cmi_lightning.predict.module import Restoration

FEW = 10  # images per feature below which a covariance is poorly known
STABLE_FID = 2048  # fewer images leave the covariance of Inception's 2048 features singular
NO_TRUTH = "left out: there is no ground truth."
KEYS = ("perceptual", "frechet", "kernel")  # of a network without a published metric
KINDS = ("", "_measurement", "_draws")  # of the restoration, of A⁺y, of the single draws
LABELS = {
    "perceptual": "perceptual distance ({0})",
    "frechet": "Fréchet distance ({0} features)",
    "kernel": "kernel distance ({0} features)",
    "lpips": "LPIPS ({0})",
    "fid": "FID",
    "kid": "KID",
}


class FeatureMetrics(RecordingCallback):
    """Distances between restored and true images in the features of a network.

    Of each image the perceptual distance, LPIPS for ``Alex()`` and ``VGG()``; of all images the
    Fréchet and the kernel distance, FID and KID for ``Inception()``. In other networks' features
    they have names of their own, as they cannot be compared with the published metrics. All are
    computed on what a saved PNG holds, of the restoration and of A⁺y ("…_measurement"). With
    several draws of an image the restoration is their mean, and "…_draws" are of the draws: the
    perceptual distance averaged over them, the others of all of them. Samples that were given up
    are left out. Without ground truth, without weights, or for images that the network does not
    take, all is left out, and a note says so.

    Writes the pooled features of every image to ``embeddings/<id>.npy`` (:func:`embedding_path`)
    and the means to ``features.json``. A second of these callbacks adds its network's name to both.

    Args:
        network: :class:`Alex`, :class:`VGG`, :class:`Inception`, :class:`GarmentClassifier` (the
            default), or a module with ``features(x)``, a list of feature maps (B, C, H, W) of
            images x (B, C, H, W) in [0, 1], ``embed(x)``, pooled features (B, D), and, if need be,
            the ``image_shape`` (C, H, W) that it takes, with None for any size.
        name: what the network is called in the results; default: its ``title``, or its class.
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        sets: also compare all restored with all true images.

    Example:
        >>> from cmi_lightning.callbacks import Alex
        >>> FeatureMetrics(Alex()).labels["frechet"]
        'Fréchet distance (AlexNet features)'
    """

    key, summary = "perceptual", "features.json"
    embeddings = "embeddings"

    def __init__(
        self,
        network: nn.Module | None = None,
        name: str | None = None,
        dirpath: str | None = None,
        sets: bool = True,
    ) -> None:
        super().__init__(dirpath)
        self.network: Any = GarmentClassifier() if network is None else network.eval()
        self.published = self.network if isinstance(self.network, Published) else None
        self.title = str(name or getattr(self.network, "title", type(self.network).__name__))
        self.keys: tuple[str | None, str, str] = getattr(self.network, "keys", KEYS)
        self.sets = sets

    @property
    def labels(self) -> dict[str, str]:
        """What the distances are called."""
        return {key: LABELS[key].format(self.title) for key in self.keys if key is not None}

    @property
    def missing(self) -> bool:
        """Whether the network has no weights."""
        return self.published is not None and self.published.network is None

    def prepare(self) -> None:
        others = [c for c in self.trainer.callbacks if isinstance(c, FeatureMetrics)]
        if self in others[1:]:
            if any(c.title == self.title for c in others if c is not self):
                raise InputError(f"Two FeatureMetrics are called '{self.title}': set their name.")
            for name in ("key", "embeddings"):
                setattr(self, name, f"{getattr(type(self), name)}-{safe_name(self.title)}")
            self.summary = f"features-{safe_name(self.title)}.json"
        if self.published is not None:
            self.published.load(self.trainer)
        self.about: dict[str, Any] = {"name": self.title, "sha256": None}
        if (file := getattr(self.network, "file", None)) is not None:
            self.about |= {"file": file.name, "sha256": sha256(file)}
        elif not self.missing:
            self.about["class"] = type(self.network).__qualname__
            self.about["sha256"] = _checksum(self.network)

    def recorded(self, record: Mapping[str, Any]) -> bool:
        """Whether the sample's distances are there, of this network, and its features."""
        same = record.get(f"{self.key}_network", "") == self.about["sha256"]
        return same and super().recorded(record)

    def files(self, record: Mapping[str, Any]) -> list[Path]:
        has = self.sets and record.get(f"{self.key}_features", bool(record[self.key]))
        return [embedding_path(self.folder, record["id"], self.embeddings)] if has else []

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        """Return the distances, and write the features."""
        self.network.to(self.module.device)  # known only now
        return [self._measure(outputs, i) for i in range(len(outputs["id"]))]

    def _measure(self, outputs: Restoration, i: int) -> dict[str, Any]:
        """Return one sample's entry: its numbers do not depend on its batch."""
        metric = self.published.metric if self.published else None
        subject = f"{metric} is" if metric else f"The distances of {self.title} are"
        values: dict[str, float] = {}
        features, notes, draws = None, [], outputs["draws"]
        if outputs["truth"] is None:
            notes.append(f"{subject} {NO_TRUTH}")
        elif not self.missing:
            each = None if draws is None else draws[i]
            both = outputs["restored"][i], outputs["measurement"][i]
            try:
                values, features = self.numbers(outputs["truth"][i], *both, each)
                if metric and len(outputs["truth"][i]) == 1:
                    seen = "sees gray images with their channel repeated three times."
                    notes.append(f"{metric} {seen}")
            except Exception as error:  # a metric is no reason to lose a run
                notes.append(f"{subject} left out: {first_line(error)}")
        if features is not None:
            data = io.BytesIO()
            np.save(data, features.cpu().numpy())
            path = embedding_path(self.folder, outputs["id"][i], self.embeddings)
            write(path, data.getvalue())
        return {
            self.key: {key: plain(value) for key, value in values.items()},
            f"{self.key}_features": features is not None,
            f"{self.key}_network": self.about["sha256"],
            f"{self.key}_notes": notes,
        }

    def numbers(
        self, truth: Tensor, restored: Tensor, measurement: Tensor, draws: Tensor | None
    ) -> tuple[dict[str, float], Tensor | None]:
        """Return the distances of one sample (C, H, W) in [−1, 1], and the features (3 + K, D).

        Raises:
            InputError: for images that the network does not take.
        """
        shown = [truth, restored, measurement, *([] if draws is None else draws)]
        x = levels(torch.stack(shown)) / 255
        self._check(tuple(x.shape[1:]))
        first = next(self.network.parameters(), x)
        x = x.to(first.dtype)
        distances = {}
        if (key := self.keys[0]) is not None:
            apart = self._apart(x[1:], x[:1].expand_as(x[1:])).tolist()
            distances = {key: apart[0], f"{key}_measurement": apart[1]}
            if apart[2:]:
                distances[f"{key}_draws"] = math.fsum(apart[2:]) / len(apart[2:])
        if not self.sets:
            return distances, None
        features = self.network.embed(x)
        if features.shape[:1] != x.shape[:1] or features.ndim != 2:
            raise InputError(
                f"embed gave {tuple(features.shape)} for {counted(len(x), 'image')}, not (B, D)."
            )
        return distances, features.float()

    def _apart(self, x: Tensor, truth: Tensor) -> Tensor:
        """Return the distances (B,) of images (B, C, H, W) in [0, 1], the network's own or ours."""
        if hasattr(self.network, "distance"):
            return self.network.distance(x, truth)
        return perceptual(self.network.features(x), self.network.features(truth))

    def _check(self, given: tuple[int, ...]) -> None:
        if self.published is not None and (reason := self.published.refusal(given)):
            raise InputError(reason)
        wanted = getattr(self.network, "image_shape", None)
        if wanted and any(w is not None and w != n for w, n in zip(wanted, given, strict=True)):
            sizes = ("×".join("any" if n is None else str(n) for n in s) for s in (wanted, given))
            raise InputError("it takes images of {} and these are {}.".format(*sizes))

    def of_sets(self, ids: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return Fréchet and kernel distance to the truth, as entries of a summary, and notes."""
        if not self.sets or len(ids) < 2:
            return {}, []
        embeddings = read_embeddings(self.folder, ids, self.embeddings)
        count, dimension = len(ids), embeddings.shape[2]
        self.about["features"] = dimension
        entries: dict[str, dict[str, Any]] = {}
        truth = embeddings[:, 0]
        for i, kind in enumerate(KINDS, start=1):
            fake = embeddings[:, i] if i < 3 else embeddings[:, 3:].flatten(0, 1)
            if not len(fake) or not (fake.isfinite().all() and truth.isfinite().all()):
                continue
            for name, distance in zip(self.keys[1:], (frechet, kernel), strict=True):
                value = distance(truth, fake)
                mean = plain(value) if math.isfinite(value) else None
                entries[f"{name}{kind}"] = {"mean": mean, "standard_error": None, "count": count}
        if self.keys[1] == "fid" and count < STABLE_FID:
            use = f"use {STABLE_FID} or more."
            return entries, [f"FID of {counted(count, 'image')} is biased and unstable; {use}"]
        if self.keys[1] != "fid" and count < FEW * dimension:
            return entries, [
                f"The Fréchet distance of {count} images in {dimension} features is too large, "
                "the more so the fewer images: compare it between equal numbers of images only."
            ]
        return entries, []

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        used = [r for r in records if r[self.key] and not r["failed"]]
        failed = failures(records)
        told = [r[f"{self.key}_notes"] for r in records]
        compared = not all(any(note.endswith(NO_TRUTH) for note in notes) for notes in told)
        notes = [*getattr(self.network, "notes", ())] if compared else []
        notes += [note for notes_of_one in told for note in notes_of_one]
        metrics, odd = statistics([r[self.key] for r in used])
        of_sets, few = self.of_sets([r["id"] for r in records if not r["failed"] and self.files(r)])
        return {
            "images": len(records),
            "failed": failed,
            "metrics": metrics | of_sets,
            "labels": self.labels,
            "network": self.about,
            "notes": [*given_up(failed, len(records), {}), *dict.fromkeys(notes), *few, *odd],
            "protocol": self.protocol(),
            "run": self.module.describe(),
        }

    def protocol(self) -> dict[str, str]:
        """Return how each distance is computed."""
        by = f"torchmetrics {version('torchmetrics')}"
        texts = {
            "pixels": "clamped to [0, 1] and rounded to 8 bits, as saved",
            "perceptual": "Zhang et al. (2018), Eq. 1 with w = 1, averaged over layers; "
            "per image, then averaged. Not LPIPS: another network, no learned weights",
            "frechet": f"{by}, restored against truth, pooled features. Not FID: another network",
            "kernel": f"{by}, kernel (x·y/D + 1)³, unbiased, all images at once. Not KID: another "
            "network. Restorations go in pairs with their truths, which lowers it",
        }
        if self.published is not None and not self.missing:
            own = f"{self.published.about}, {self.about['file']} sha256:{self.about['sha256'][:16]}"
            texts |= dict.fromkeys(("lpips", "fid", "kid"), own)
        return {key: texts[key] for key in ("pixels", *self.keys) if key in texts}

    def logged(self) -> Iterable[tuple[int, dict[str, float]]]:
        return [(0, means(self.result["metrics"]))]


def _checksum(network: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors, by name, type and shape."""
    state = {name: value.cpu().contiguous().clone() for name, value in network.state_dict().items()}
    return hashlib.sha256(save(state)).hexdigest()
