"""Image quality of restorations, per image and on average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from cmi_lightning.callbacks.base import RecordingCallback, failures, plain
from cmi_lightning.callbacks.distances import embedding_path
from cmi_lightning.callbacks.feature_metrics import FeatureMetrics
from cmi_lightning.callbacks.networks import VGG, Alex, Inception
from cmi_lightning.callbacks.summary import (
    PROTOCOL,
    SSIM_WINDOW,
    costs,
    given_up,
    means,
    print_table,
    statistics,
    table,
    timing,
)
from cmi_lightning.checked import check
from cmi_lightning.data.pictures import levels
from cmi_lightning.errors import InputError, counted
from cmi_lightning.files import write, write_json
from cmi_lightning.paths import inside
from cmi_lightning.predict.module import Restoration

NO_TRUTH = "There is no ground truth: PSNR, SSIM, LPIPS and FID are left out."


class RestorationMetrics(RecordingCallback):
    """PSNR, SSIM, LPIPS and FID of restorations, and of the measurement seen as an image (A⁺y).

    All are computed on what a saved PNG holds: images clamped to [0, 1] and rounded to 8 bits, data
    range 1, never stretched. PSNR, SSIM and LPIPS are per image and then averaged. LPIPS, FID and
    KID are those of :class:`FeatureMetrics`; where a network is not on disk, the summary says how
    to get it. Without ground truth only the residual ‖y − A x̂‖ of the (unclamped) restoration is
    reported. With several draws of an image, these are of their mean, "…_draws" of the draws,
    averaged, and FID of all draws. Samples that were given up are in no mean, and listed.

    Writes ``metrics.csv``, a row per image (``sigma``: its noise level on [−1, 1], where images
    have their own), ``summary.json``, with the passes through the network, and ``timing.json``,
    with seconds and memory. Sends the means to the trainer's loggers and prints a table.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.
        lpips: backbone of LPIPS, or None to leave it out.
        fid: whether FID and KID are wanted.
        lpips_weights: torchvision's checkpoint of the backbone (``alexnet-owt-7be5be79.pth`` or
            ``vgg16-397923af.pth``); default: torch.hub's cache.
        fid_weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; default:
            torch.hub's cache.
        fetch: bring missing networks into torch.hub's cache, as ``cmi-lightning fetch`` does.

    Raises:
        InputError: before sampling, if a weights file that was named is missing or another one.

    Example:
        >>> [metric.title for metric in RestorationMetrics(lpips="vgg").networks]
        ['VGG16', 'Inception']
    """

    key, summary = "metrics", "summary.json"

    def __init__(
        self,
        dirpath: str | None = None,
        lpips: Literal["alex", "vgg"] | None = "alex",
        fid: bool = True,
        lpips_weights: str | None = None,
        fid_weights: str | None = None,
        fetch: bool = False,
    ) -> None:
        super().__init__(dirpath)
        self.lpips = lpips
        check(self, "lpips")
        self.networks: list[FeatureMetrics] = []
        if lpips is not None:
            backbone = {"alex": Alex, "vgg": VGG}[lpips](lpips_weights, fetch)
            self.networks.append(FeatureMetrics(backbone, dirpath=dirpath, sets=False))
        if fid:
            inception = FeatureMetrics(Inception(fid_weights, fetch), dirpath=dirpath)
            inception.embeddings = "features"
            self.networks.append(inception)

    def prepare(self) -> None:
        """Load the feature networks, so that a wrong file stops the run before sampling."""
        for logger in self.trainer.loggers:
            csv = isinstance(logger, CSVLogger)
            if csv and Path(logger.log_dir).resolve() == self.folder.resolve():
                raise InputError(
                    f"CSVLogger and RestorationMetrics would both write '{self.folder}/metrics.csv'"
                    ": set trainer.logger.init_args.name to logs."
                )
        for network in self.networks:
            network.setup(self.trainer, self.module, "predict")

    @property
    def _at_hand(self) -> dict[str, FeatureMetrics]:
        """The networks that have weights, by name and checksum."""
        there = [n for n in self.networks if not n.missing]
        return {f"{n.title} {n.about['sha256']}": n for n in there}

    def recorded(self, record: Mapping[str, Any]) -> bool:
        """Whether the sample's row is there, with all that can be had now."""
        return super().recorded(record) and set(self._at_hand) <= set(record["networks"])

    def files(self, record: Mapping[str, Any]) -> list[Path]:
        of_sets = [n for n in self._at_hand.values() if n.sets and record["features"]]
        return [embedding_path(self.folder, record["id"], n.embeddings) for n in of_sets]

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        """Return the batch's rows, and write what they cost."""
        columns: dict[str, Tensor] = {}
        notes = [NO_TRUTH]
        if (truth := outputs["truth"]) is not None:
            columns, notes = self._quality(outputs, truth)
        columns |= {"residual": outputs["residual"], "expected_residual": outputs["noise_norm"]}
        values = {name: column.tolist() for name, column in columns.items()}
        entries: list[dict[str, Any]] = [
            {
                "metrics": {key: plain(column[i]) for key, column in values.items()},
                "networks": list(self._at_hand),
                "notes": list(notes),
                "features": False,
            }
            for i in range(len(outputs["id"]))
        ]
        for network in self._at_hand.values() if truth is not None else ():
            for entry, of_network in zip(entries, network.measure(outputs), strict=True):
                entry["metrics"] |= of_network[network.key]
                entry["notes"] += of_network[f"{network.key}_notes"]
                entry["features"] |= of_network[f"{network.key}_features"]
        took = {
            "seconds": outputs["seconds"],
            "peak_memory": outputs["details"].peak_memory,
            "batch": len(outputs["id"]),
            "device": str(self.module.device),
        }
        for name in outputs["id"]:
            write_json(inside(self.folder / "timings", name, ".json"), took)
        return entries

    @staticmethod
    def _quality(outputs: Restoration, truth: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """Return PSNR and SSIM (B,) of what is shown, and what is left out."""
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        target, small = levels(truth) / 255, min(truth.shape[2:]) < SSIM_WINDOW

        def quality(x: Tensor, suffix: str) -> dict[str, Tensor]:
            x = levels(x) / 255
            psnr = peak_signal_noise_ratio(
                x, target, data_range=1.0, reduction="none", dim=(1, 2, 3)
            )
            if small:
                return {f"psnr{suffix}": psnr}
            ssim = structural_similarity_index_measure(
                x, target, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
            )
            return {f"psnr{suffix}": psnr, f"ssim{suffix}": torch.as_tensor(ssim).reshape(-1)}

        columns = quality(outputs["restored"], "")
        columns |= quality(outputs["measurement"], "_measurement")
        if outputs["draws"] is not None:
            many = [quality(x, "_draws") for x in outputs["draws"].unbind(1)]
            columns |= {name: torch.stack([m[name] for m in many]).mean(0) for name in many[0]}
        return columns, [
            f"SSIM is left out: it needs {counted(SSIM_WINDOW, 'pixel')} per side."
        ] * small

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        write(self.folder / "metrics.csv", table(self._rows(records)).encode())
        self.timing = timing(self.folder, records)
        write_json(self.folder / "timing.json", self.timing)

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        failed, skipped = failures(records), self.skipped
        metrics, odd = statistics([row for row in self._rows(records) if not row["failed"]])
        protocol = {**PROTOCOL, "torchmetrics": version("torchmetrics")}
        compared = not all(NO_TRUTH in record["notes"] for record in records)
        notes = [note for n in self.networks if compared for note in n.network.notes]
        notes += [note for record in records for note in record["notes"]]
        used = [r["id"] for r in records if r["features"] and not r["failed"]]
        for network in self._at_hand.values():
            of_sets, few = network.of_sets(used)
            if "fid_draws" in of_sets:
                of_sets["fid"] = of_sets["fid_draws"]
            metrics |= {k: v for k, v in of_sets.items() if v["mean"] is not None}
            protocol |= {k: v for k, v in network.protocol().items() if k != "pixels"}
            notes += few
        return {
            "images": len(records),
            "failed": failed,
            "skipped": skipped,
            "metrics": metrics,
            "costs": costs(records),
            "notes": [*given_up(failed, len(records), skipped), *dict.fromkeys(notes), *odd],
            "protocol": protocol,
            "run": self.module.describe(),
        }

    @staticmethod
    def _rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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

    def logged(self) -> Iterable[tuple[int, dict[str, float]]]:
        return [(0, means(self.result["metrics"]))]

    def show(self) -> None:
        print_table(self.result, self.timing, self.folder)
