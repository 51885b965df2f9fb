"""What a batch's restoration is: how it is drawn, read back from its files, and whether it fits."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from cmi_lightning.data.images import read_image
from cmi_lightning.errors import counted
from cmi_lightning.files import read_json
from cmi_lightning.linalg import norm
from cmi_lightning.noise import SampleNoise
from cmi_lightning.predict.batch import images_of
from cmi_lightning.predict.memory import keep_memory, peak_memory, reset_peak_memory
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.step import Cost, Record

FAR = 2.0  # residuals, in units of the noise's, that no right restoration has


class Details:
    """A batch's problem (y, A and the noise level), the last step's record, and what it cost.

    A plain class: Lightning looks into containers and dataclasses and refuses frozen ones. After
    a batch that did not fit into memory, problem and record are those of its last part. ``cost``
    counts an image's network passes over all its draws; ``peak_memory`` is in bytes, of the GPU
    during the batch, or of the process so far.
    """

    def __init__(self, problem: Problem, record: Record, cost: Cost, peak_memory: int) -> None:
        self.problem, self.record = problem, record
        self.cost, self.peak_memory = cost, peak_memory


class Restoration(TypedDict):
    """What ``predict_step`` returns and callbacks read; images are in [−1, 1].

    ``id``: list of sample ids. ``restored``: (B, C, H, W), not clamped. ``measurement``: A⁺y
    (B, C, H, W), or a nonlinear operator's guess: the measurement seen as an image. ``truth``:
    (B, C, H, W), or None for real measurements. ``draws``: (B, K, C, H, W), of which
    ``restored`` is the mean; None where K = 1.
    ``residual``: ‖y − A x̂‖ (B,) of ``restored``, ``residual_draws`` (B, K) of each draw, and
    ``noise_norm`` (B,) what noise alone leaves.
    ``failed``: why a sample was given up, by id. ``seconds``: sampling time per image. ``records``:
    what is kept of each sample, with its noise level ``sigma`` where samples have their own;
    callbacks add to it. ``details``: what else a callback may want.

    A batch that is another process's, or was finished by an earlier run, has no ids, no images and
    no details; of one that is so in part, only the rest is there.
    """

    id: list[str]
    restored: Tensor
    measurement: Tensor
    truth: Tensor | None
    draws: Tensor | None
    residual: Tensor
    residual_draws: Tensor
    noise_norm: Tensor
    failed: dict[str, str]
    seconds: float
    records: list[dict[str, Any]]
    details: Details


def restoring(
    problem: Problem,
    like: Tensor,
    truth: Tensor | None,
    ids: list[str],
    *,
    sampler: Sampler,
    seed: int,
    draws: int,
) -> Generator[Record | None, None, Restoration]:
    """Draw from the posterior of a batch; yield None before each draw, and a record of each step.

    ``like`` has the shape of the images (B, C, H, W), as their ``truth``, where it is known.
    The first of K draws is the one of K = 1.
    """
    found: list[Tensor] = []
    cost = Cost()
    failed: dict[str, str] = {}
    if like.device.type == "cpu":
        keep_memory()
    reset_peak_memory(like.device)
    started = time.perf_counter()
    for k in range(draws):
        yield None
        own = SampleNoise(seed, ids if k == 0 else [f"{name}#{k}" for name in ids])
        for record in sampler.iterate(problem, own, like):
            record = replace(record, ids=ids)
            yield record
        found.append(record.x)
        cost.forwards += record.forwards
        cost.vjps += record.vjps
        cost.second_order += record.second_order
        for name, reason in _reasons(record).items():
            failed.setdefault(name, (f"draw {k}: " if draws > 1 else "") + reason)
    seconds = (time.perf_counter() - started) / len(ids)  # of sampling, without A⁺y
    restored = found[0] if draws == 1 else torch.stack(found, 1).mean(1)
    return judged(
        problem,
        restored,
        found,
        id=ids,
        truth=truth,
        failed=failed,
        seconds=seconds,
        records=_new_records(problem, len(ids)),
        details=Details(problem, record, cost, peak_memory(like.device)),
    )


def judged(problem: Problem, restored: Tensor, found: list[Tensor], **other: Any) -> Restoration:
    """Return a restoration with its measurement and residuals; ``found`` are its K draws."""
    return cast(
        "Restoration",
        {
            "restored": restored,
            "measurement": problem.operator.guess(problem.y),
            "draws": torch.stack(found, 1) if len(found) > 1 else None,
            "residual": norm(problem.y - problem.operator(restored)),
            "residual_draws": torch.stack(
                [norm(problem.y - problem.operator(x)) for x in found], 1
            ),
            "noise_norm": problem.noise_norm,
            **other,
        },
    )


def read_back(
    writer: Any, records: list[Path], problem: Problem, truth: Tensor | None
) -> Restoration | None:
    """Return a batch's restoration from the files of the run that finished it, if it kept images.

    Images are as fine as their files, of 8 or 16 bits. ``seconds`` is 0, and there is no last step.
    """
    kept = [read_json(path) for path in records]
    if writer is None or not all(record.get(writer.key) for record in kept):
        return None
    files = [[str(name) for name in record[writer.key]] for record in kept]

    def images(names: list[str]) -> Tensor:
        return torch.cat([read_image(writer.folder / name) for name in names]).to(problem.y)

    restored = torch.stack([images([n for n in names if _is(n, "restored")]) for names in files])
    each = [[images([n]) for n in names if _is(n, "draws")] for names in files]
    draws = [torch.stack(x) for x in zip(*each, strict=True)] if all(each) else [restored]
    return judged(
        problem,
        restored,
        draws,
        id=[record["id"] for record in kept],
        truth=truth,
        failed={record["id"]: record["failed"] for record in kept if record["failed"]},
        seconds=0.0,
        records=kept,
        details=Details(problem, None, Cost(), 0),  # type: ignore[arg-type]
    )


def _is(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def nothing(batch: dict[str, Any]) -> Restoration:
    """Return the restoration of a batch of which nothing is to be done."""
    images = images_of(batch)[:0]
    none = images.new_zeros(0)
    return Restoration(
        id=[],
        restored=images,
        measurement=images,
        truth=images if "x" in batch else None,
        draws=None,
        residual=none,
        residual_draws=none[:, None],
        noise_norm=none,
        failed={},
        seconds=0.0,
        records=[],
        details=None,  # type: ignore[typeddict-item]
    )


def joined(parts: list[Restoration]) -> Restoration:
    """Return the restorations of a batch's parts as one."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[-1].copy()
    for key in (
        *("restored", "measurement", "truth", "draws"),
        *("residual", "residual_draws", "noise_norm"),
    ):
        tensors = [part[key] for part in parts]
        whole[key] = None if tensors[0] is None else torch.cat(tensors)  # type: ignore[arg-type]
    whole["id"] = [name for part in parts for name in part["id"]]
    whole["records"] = [record for part in parts for record in part["records"]]
    whole["failed"] = {k: v for part in parts for k, v in part["failed"].items()}
    whole["seconds"] = sum(p["seconds"] * len(p["id"]) for p in parts) / len(whole["id"])
    whole["details"].peak_memory = max(part["details"].peak_memory for part in parts)
    return whole


def _new_records(problem: Problem, count: int) -> list[dict[str, Any]]:
    """Return the samples' records, each with its noise level if it has its own."""
    std = problem.noise_std
    if isinstance(std, Tensor) and std.numel() == count:
        return [{"sigma": value} for value in std.flatten().tolist()]
    return [{} for _ in range(count)]


def _reasons(record: Record) -> dict[str, str]:
    """Return why samples were given up."""
    reasons = {}
    for name, number in zip(record.ids, record.stopped.tolist(), strict=True):
        if number:
            what = "not a number" if number > 0 else "diverged"
            reasons[name] = f"{what} at step {abs(number)} of {record.num_steps}"
    return reasons


def fits(result: Restoration) -> list[float]:
    """Return ‖y − A x̂‖ / (σ√m) of the samples of a batch that did not fail."""
    pairs = zip(result["id"], (result["residual"] / result["noise_norm"]).tolist(), strict=True)
    return [fit for name, fit in pairs if name not in result["failed"]]


def misfit(fits: list[float], given: bool) -> str | None:
    """Return a sentence if ‖y − A x̂‖ / (σ√m) of each image is far above 1; None if they fit.

    >>> misfit([0.9, 1.1], given=True)
    """
    finite = sorted(fit for fit in fits if math.isfinite(fit))
    if not finite or (middle := finite[len(finite) // 2]) <= FAR:
        return None
    causes = "too few steps, or a step size (scale) that is too small or too large"
    if given:
        causes = (
            "a kernel of the other convention (data.kernel_convention), a reduction without "
            f"antialiasing, an inverted mask, a noise level that is too low, {causes}"
        )
    return (
        f"The restorations do not fit the measurements: ‖y − A x̂‖ is {middle:.3g} times what "
        f"noise alone leaves (median of {counted(len(finite), 'image')}). Usual causes: {causes}."
    )
