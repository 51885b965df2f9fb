"""How well the draws of each image represent the posterior: coverage, spread and residual."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmi_lightning.callbacks.base import RecordingCallback, failures, plain
from cmi_lightning.callbacks.summary import given_up, plus_minus, show
from cmi_lightning.data.pictures import levels
from cmi_lightning.errors import InputError, counted
from cmi_lightning.noise import SampleNoise
from cmi_lightning.predict.module import Restoration
from cmi_lightning.statistics import mean_and_error

INTERVALS = (0.5, 0.9)  # probabilities of the central intervals
TINY = 1e-9  # rounding errors
Estimate = dict[str, float | None]
DEFINITIONS = {
    "pixels": "of truth and draws: clamped to [-1, 1] and rounded to 8 bits, as saved",
    "ranks": "pixels by how many of the K draws lie below the truth, 0 to K; ties are broken at "
    "random; equal counts are expected",
    "coverage": "per image, the share of pixels whose truth lies in the central interval of the "
    "draws: ranks that its ends cut count in part, so that equal counts give the interval's "
    "probability exactly",
    "spread_skill": "square root of the ratio of two sums over images: the draws' variance, times "
    "(K + 1)/K, and the squared error of their mean; below 1 the draws are too much alike",
    "residual": "root of the mean over draws and images of |y - A x|^2 / (sigma^2 m), before "
    "clamping",
    "standard_error": "over images: the pixels of one image are not independent",
    "expected": "of draws from the posterior that belongs to the images' distribution and the "
    "measurement; draws from that distribution itself have it too, but for the residual",
}
NO_TRUTH = "There is no ground truth: the quality of the draws is left out."
NO_NUMBER = "Images with draws that are not numbers are left out."
NO_NOISE = "The measurements have no noise: the residual has nothing to be compared with."


def ranks(draws: Tensor, truth: Tensor, noise: Tensor) -> Tensor:
    """Return how many of K draws (K, *) lie below the truth (*), ties broken at random.

    r = #{xₖ < x} + ⌊u·(#{xₖ = x} + 1)⌋ with independent noise u ~ U[0, 1): uniform on 0, …, K
    wherever the truth is distributed as the draws are, for discrete values too.

    Source: Hamill (2001), rank histograms; Talts et al. (2018), simulation-based calibration;
    Czado, Gneiting and Held (2009), randomised for discrete values.
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    among = (noise * (equal + 1)).long()
    return below + torch.minimum(among, equal)  # the product may round up


def coverage(counts: Sequence[int], interval: float) -> float:
    """Return the share of truths in their draws' central p-interval, by counts of rank 0, …, K.

    Rank r stands for the piece [r, r + 1]/(K + 1) of the unit interval, and counts with the part
    of it that lies in [(1 − p)/2, (1 + p)/2]. Equal counts give p exactly, for every K. Where
    (1 − p)/2·(K + 1) < 1, the outermost ranks always count: see :func:`least_coverage`.
    """
    size = len(counts)
    start, end = (1 - interval) / 2 * size, (1 + interval) / 2 * size
    inside = [max(0.0, min(r + 1, end) - max(r, start)) for r in range(size)]
    return math.fsum(map(math.prod, zip(counts, inside, strict=True))) / sum(counts)


def least_coverage(draws: int, interval: float) -> float:
    """Return the coverage of draws that never enclose the truth."""
    return coverage([1, *[0] * (draws - 1), 1], interval)


class PosteriorQuality(RecordingCallback):
    """Whether several draws of each image are spread as a posterior should be.

    Where the truth is distributed as the draws are, its rank among the K draws of a pixel is
    uniform: it lies in the central 50 % and 90 % of the draws as often as that. The draws'
    variance, times (K + 1)/K, equals the squared error of their mean. Every draw leaves a residual
    ‖y − A x‖ of σ√m in the root mean square. The residual is of the unclamped draws, all else of
    what a saved PNG holds. Calibration is over the images: draws from the prior alone pass all but
    the residual. Samples that were given up are left out, and listed.

    Writes ``posterior.json``: the values, their standard errors over images, what a calibrated
    sampler has, ranks, notes and definitions. Sends the values to the loggers and prints them.

    Args:
        dirpath: folder to write to; default: the trainer's ``default_root_dir``.

    Raises:
        InputError: before sampling, if the module draws one sample per image.

    Source: Talts et al. (2018) and Hamill (2001), ranks; Fortin et al. (2014), spread and skill.

    Example:
        >>> PosteriorQuality("out").dirpath
        'out'
    """

    key, summary = "posterior", "posterior.json"

    def prepare(self) -> None:
        if getattr(self.module, "samples_per_image", 1) < 2:
            raise InputError(
                "PosteriorQuality compares the draws of an image: set --model.samples_per_image to "
                "2 or more (16, say), or leave the callback out."
            )

    def measure(self, outputs: Restoration) -> list[dict[str, Any]]:
        """Return ranks, spread, skill and residual of every sample."""
        truth, draws = outputs["truth"], outputs["draws"]
        if truth is None or draws is None:
            return [{"posterior": {"note": NO_TRUTH}} for _ in outputs["id"]]
        noise, entries = SampleNoise(self.module.seed, outputs["id"]), []
        for i in range(len(outputs["id"])):
            numbers = quality(draws[i], truth[i], noise.generator(i, "ranks"))
            if norm := float(outputs["noise_norm"][i]):
                square = outputs["residual_draws"][i].cpu().double().square().mean()
                numbers["residual"] = plain(float(square) / norm**2)
            entries.append({"posterior": numbers})
        return entries

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        failed = failures(records)
        result = summary([r["posterior"] for r in records if not r["failed"]])
        notes = [*given_up(failed, len(records), self.skipped), *result.pop("notes")]
        return {
            "images": len(records),
            "draws": self.module.samples_per_image,
            "failed": failed,
            **result,
            "definitions": DEFINITIONS,
            "run": self.module.describe(),
            "notes": notes,
        }

    def _estimates(self) -> dict[str, Estimate]:
        shown = {f"coverage_{name}": value for name, value in self.result["coverage"].items()}
        return shown | {name: self.result[name] for name in ("spread_skill", "residual")}

    def logged(self) -> Iterable[tuple[int, dict[str, float]]]:
        shown = self._estimates().items()
        return [(0, {f"posterior/{k}": v["value"] for k, v in shown if v["value"] is not None})]

    def show(self) -> None:
        labels = [f"coverage of the central {name} %" for name in self.result["coverage"]]
        labels += ["spread / error of the mean", "‖y − A x‖ / (σ√m)"]
        rows = [
            (label, plus_minus(v["value"], v["standard_error"], 3), f"{v['expected']:g}")
            for label, v in zip(labels, self._estimates().values(), strict=True)
        ]
        title = f"{counted(self.result['images'], 'image')}, {self.result['draws']} draws of each"
        there = any(v["value"] is not None for v in self._estimates().values())
        notes = [*self.result["notes"], f"All of this: {self.folder / self.summary}"]
        show(f"{title}, ± standard error", ("draws", "calibrated"), rows if there else [], notes)


def quality(draws: Tensor, truth: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Return ranks, spread and skill of one image, on [−1, 1].

    ``ranks``: counts of pixels (K + 1). ``spread``: the draws' unbiased variance times (K + 1)/K,
    and ``skill``: the squared error of their mean, both averaged over pixels. For draws like the
    truth, of variance v, the error has variance v from the truth and v/K from the mean.

    ``draws`` (K, C, H, W) and ``truth`` (C, H, W) are in [−1, 1]; ``generator`` is for ties.

    Source: Fortin et al. (2014), for (K + 1)/K.
    """
    if not bool(draws.isfinite().all() & truth.isfinite().all()):
        return {"note": NO_NUMBER}
    x, each = (levels(v).cpu().double() / 127.5 - 1 for v in (truth, draws))
    count = len(each)
    noise = torch.rand(x.shape, dtype=torch.float64, generator=generator)
    return {
        "ranks": torch.bincount(ranks(each, x, noise).flatten(), minlength=count + 1).tolist(),
        "spread": plain(float(each.var(0).mean()) * (count + 1) / count),
        "skill": plain(float((each.mean(0) - x).square().mean())),
    }


def summary(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return values, standard errors over images, the sum of all ranks, and notes.

    Images have what :func:`quality` returned, and ``residual``, the mean of ‖y − A x‖²/(σ²m).
    """
    notes = dict.fromkeys(image["note"] for image in images if "note" in image)
    used = [image for image in images if "ranks" in image]
    squares = [image["residual"] for image in used if "residual" in image]
    if len(squares) < len(used):
        notes[NO_NOISE] = None
    counts = [image["ranks"] for image in used]
    draws = len(counts[0]) - 1 if counts else 0
    covered = {}
    for p in INTERVALS:
        value = _mean([coverage(each, p) for each in counts])
        covered[f"{100 * p:g}"] = {**value, "expected": p}
        if counts and (least := least_coverage(draws, p)) > TINY:
            notes[
                f"The coverage of {100 * p:g} % by {draws} draws is {least:.2g} at least, however "
                f"narrow they are; {math.ceil(2 / (1 - p) - TINY) - 1} draws have no such bound."
            ] = None
    if len(used) == 1:
        notes["One image has no standard error."] = None
    return {
        "coverage": covered,
        "spread_skill": {**_root_ratio([(i["spread"], i["skill"]) for i in used]), "expected": 1.0},
        "residual": {**_root_ratio([(square, 1.0) for square in squares]), "expected": 1.0},
        "ranks": [sum(column) for column in zip(*counts, strict=True)],
        "notes": list(notes),
    }


def _mean(values: Sequence[float]) -> Estimate:
    """Return a mean and its standard error."""
    estimate = mean_and_error(values)
    return {"value": estimate.mean, "standard_error": estimate.se}


def _root_ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Return √(Σa/Σb) and its standard error, to first order in the means' errors."""
    top, bottom = (math.fsum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    if not bottom:
        return {"value": None, "standard_error": None}
    value = math.sqrt(top / bottom)
    if not value:
        return {"value": 0.0, "standard_error": None}
    mean = bottom / len(pairs)
    error = _mean([(a - value**2 * b) / mean for a, b in pairs])["standard_error"]
    return {"value": value, "standard_error": None if error is None else error / (2 * value)}
