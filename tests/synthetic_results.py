"""Results as `cmi-lightning table` makes them, with images, for the tests of the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cmi_lightning

GARMENTS = Path(cmi_lightning.__file__).parent / "assets" / "fashion_mnist_test"
TASKS = {
    "inpaint_random": "random inpainting, 90 %",
    "inpaint_box": "box inpainting, 14×14",
    "gaussian_blur": "Gaussian blur",
    "motion_blur": "motion blur",
    "super_resolution": "super-resolution ×4",
    "denoise": "denoising, σ = 0.4",
}
METHODS = ("none", "DPS", "ΠGDM", "MCG", "DSG")
METRICS = (
    ("psnr", "PSNR", "dB", "higher", 2, True),
    ("ssim", "SSIM", "", "higher", 3, True),
    ("perceptual", "perceptual distance (garment classifier)", "", "lower", 3, True),
    ("frechet", "Fréchet distance (garment classifier features)", "", "lower", 2, False),
    ("kernel", "kernel distance (garment classifier features)", "", "lower", 3, False),
)
LEVEL = {"psnr": 19.0, "ssim": 0.62, "perceptual": 0.41, "frechet": 6.2, "kernel": 0.12}
SPREAD = {"psnr": 0.35, "ssim": 0.012, "perceptual": 0.02, "frechet": 0.9, "kernel": 0.02}


def synthetic_results(
    folder: Path, tasks: int = 6, methods: int = 5, images: int = 200, examples: int = 3
) -> dict[str, Any]:
    """Return made-up results, and write their PNG files into a folder."""
    rng = np.random.default_rng(7)
    keys, names = list(TASKS)[:tasks], list(METHODS)[:methods]
    cells: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "title": "CMI on Fashion-MNIST",
        "command": "cmi-lightning table -c table/fashion",
        "commit": "b22d4e5f00",
        "created": "2026-11-24 15:30 UTC",
        "config": "images: 200\nmodel:\n  num_steps: 100\n",
        "environment": {"cmi-lightning": "0.1.0", "torch": "2.14.1", "python": "3.12.3"},
        "images": images,
        "steps": 100,
        "notes": [
            "30 comparisons are made of each metric. A difference counts as significant after "
            "Holm's correction over them (family-wise 5 %), each metric and each kind of "
            "comparison for itself.",
            "The rows of equal cost have the step sizes that were chosen for 100 steps; nothing "
            "was searched for their longer runs.",
            "Fréchet and kernel distances over 200 images are biased upwards; compare them only "
            "within this table.",
        ],
        "protocol": {"psnr": "10 log₁₀(4 / MSE) per image on [−1, 1], clamped, then the mean."},
        "metrics": [
            dict(zip(("key", "label", "unit", "better", "digits", "per_image"), m, strict=True))
            for m in METRICS
        ],
        "tasks": [{"key": key, "label": TASKS[key]} for key in keys],
        "methods": names,
        "cells": cells,
        "measured": {},
        "comparisons": comparisons,
        "posterior": [],
        "study": {task: _study(rng, names) for task in keys},
        "objective": "psnr",
        "examples": {},
        "extremes": [],
    }
    for t, task in enumerate(keys):
        results["measured"][task] = {
            "metrics": {"psnr": {"mean": 12.1 + t, "se": 0.21}, "ssim": {"mean": 0.31, "se": 0.01}}
        }
        for m, method in enumerate(names):
            base = {k: LEVEL[k] * (1 + 0.05 * math.sin(t + 2 * m)) for k in LEVEL}
            for variant in ("base", "cmi", "equal"):
                label = {"base": "{}", "cmi": "CMI+{}", "equal": "{}, equal passes"}[variant]
                label = "CMI alone" if (variant, method) == ("cmi", "none") else label
                metrics: dict[str, Any] = {}
                paired: dict[str, Any] = {}
                against: dict[str, Any] = {}
                for key, _, _, better, _, per_image in METRICS:
                    gain = 1 if better == "higher" else -1
                    centre = {"base": 0.0, "cmi": rng.normal(0.1, 0.5), "equal": 1.4}[variant]
                    values = gain * SPREAD[key] * (centre + rng.normal(0, 1.6, images))
                    mean = float(values.mean()) if variant != "base" else 0.0
                    metrics[key] = {
                        "mean": base[key] + mean,
                        "se": 0.02 * base[key] if per_image else None,
                    }
                    paired[key] = _comparison(values, better, per_image)
                    other = values - gain * 1.4 * SPREAD[key]
                    against[key] = _comparison(other, better, per_image)
                steps = 100 if variant != "equal" else 310
                cells.append(
                    {
                        "task": task,
                        "method": method,
                        "variant": variant,
                        "label": label.format(method),
                        "steps": steps,
                        "images": images,
                        "failed": 2 if (t, m, variant) == (1, 3, "cmi") else 0,
                        "options": {"step_sizes.dps": 4.0},
                        "metrics": metrics,
                        "passes": {"base": 200.0, "cmi": 618.4, "equal": 620.0}[variant],
                        "seconds": {"base": 0.61, "cmi": 2.13, "equal": 1.94}[variant],
                        "folder": f"cells/{task}/{method}",
                        "curves": _curves(rng, method, variant, steps),
                    }
                )
                if variant != "base":
                    comparisons.append(
                        {"task": task, "method": method, "variant": variant, "against": "base"}
                        | {"metrics": paired}
                    )
                if variant == "cmi":
                    comparisons.append(
                        {"task": task, "method": method, "variant": "cmi", "against": "equal"}
                        | {"metrics": against}
                    )
        _images(results, folder, rng, task, names, examples)
    return results


def _comparison(values: np.ndarray, better: str, per_image: bool) -> dict[str, Any]:
    mean, se = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    gain = values if better == "higher" else -values
    p = math.erfc(abs(mean / se) / math.sqrt(2))
    entry: dict[str, Any] = {"difference": mean, "low": mean - 1.96 * se, "high": mean + 1.96 * se}
    entry |= {"p": p, "significant": p < 0.05 / 60, "pairs": len(values)}
    if per_image:
        entry |= {"improved": float((gain > 0).mean()), "values": values.tolist()}
    return entry


def _study(rng: np.random.Generator, methods: list[str]) -> dict[str, Any]:
    """What was tried: DPS is at the edge, ΠGDM breaks an image, CMI+DPS is better without CMI."""

    def score(mean: float | None) -> dict[str, Any]:
        whole = mean is not None
        return {
            "mean": mean,
            "standard_error": 0.6 + 0.2 * rng.random() if whole else None,
            "images": 12 if whole else 9,
        }

    def entry(
        trials: dict[str, float | None], winner: float, chosen: float, edge: bool
    ) -> dict[str, Any]:
        return {
            "trials": {value: score(mean) for value, mean in trials.items()},
            "winner": winner,
            "chosen": chosen,
            "at_edge": edge,
        }

    found = {
        "DPS": entry({"0.5": 18.0, "1": 18.32, "2": 18.42, "4": 18.59}, 4.0, 4.0, True),
        "ΠGDM": entry({"0.25": 13.74, "0.5": 16.53, "1": 17.62, "2": None}, 1.0, 1.0, False),
        "CMI+none": entry({"0": 9.72, "0.01": 9.73, "0.03": 9.86, "0.1": 9.66}, 0.03, 0.03, False),
        "CMI+DPS": entry({"0": 18.59, "0.01": 18.51, "0.03": 18.52, "0.1": 18.5}, 0, 0.03, False),
    }
    return {name: e for name, e in found.items() if name.removeprefix("CMI+") in methods}


def _curves(rng: np.random.Generator, method: str, variant: str, steps: int) -> dict[str, Any]:
    n = np.arange(1, steps + 1)
    level = 1 + 0.3 * rng.random()
    curves = {"residual": level * (1200 * np.exp(-n / 9) + 3 + 5 * np.exp(-n / 60))}
    if method != "none":
        curves[f"sample/{method}"] = level * 4 * np.exp(-n / 50)
    if variant == "cmi":
        late = n[(n > 15) & (n % 2 == 0)]
        kept = {
            "cmi/value": level * 140 * np.exp(-(((late - 70) / 40) ** 2)),
            "cmi/gradient": level * 20 * np.exp(-late / 60),
            "step/CMI": level * 0.1 * np.exp(-late / 80),
        }
        some = {q: dict(zip(map(str, late), v.tolist(), strict=True)) for q, v in kept.items()}
    else:
        some = {}
    whole = {q: dict(zip(map(str, n), v.tolist(), strict=True)) for q, v in curves.items()}
    return whole | some


def _images(
    results: dict[str, Any],
    folder: Path,
    rng: np.random.Generator,
    task: str,
    methods: list[str],
    count: int,
) -> None:
    def save(path: str, pixels: np.ndarray) -> str:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / path)
        return path

    results["examples"][task] = []
    for i in range(count):
        name = f"{i:05d}"
        truth = np.asarray(Image.open(GARMENTS / f"{name}.png"), dtype=float)
        small = truth[::4, ::4] if task == "super_resolution" else truth
        example: dict[str, Any] = {
            "id": name,
            "truth": save(f"truth/{name}.png", truth),
            "measurement": save(
                f"measured/{task}/{name}.png", small + rng.normal(0, 60, small.shape)
            ),
            "restored": {},
        }
        for method in methods:
            example["restored"][method] = {
                variant: save(
                    f"cells/{task}/{method}/{variant}/{name}.png",
                    truth + rng.normal(0, noise, truth.shape),
                )
                for variant, noise in (("base", 25), ("cmi", 18), ("equal", 14))
            }
        results["examples"][task].append(example)
    for method in methods[1:3]:
        rows = [
            {
                "id": e["id"],
                "difference": 1.2 - 0.3 * i,
                "truth": e["truth"],
                "measurement": e["measurement"],
                "base": e["restored"][method]["base"],
                "cmi": e["restored"][method]["cmi"],
            }
            for i, e in enumerate(results["examples"][task])
        ]
        worst = [row | {"difference": -row["difference"]} for row in rows]
        results["extremes"].append(
            {"task": task, "method": method, "metric": "psnr", "best": rows, "worst": worst}
        )
    if task in ("inpaint_random", "super_resolution"):
        for variant in ("base", "cmi"):
            root = f"posterior/{task}/DPS/{variant}"
            for i in range(count):
                truth = np.asarray(Image.open(GARMENTS / f"{i:05d}.png"), dtype=float)
                save(f"{root}/restored/{i:05d}.png", truth * 0.95)
                save(f"{root}/std/{i:05d}.png", 40 + 60 * np.abs(np.gradient(truth)[0]) / 128)
            results["posterior"].append(
                {
                    "task": task,
                    "method": "DPS",
                    "variant": variant,
                    "images": 16,
                    "draws": 16,
                    "coverage": {"50": 0.41, "90": 0.80},
                    "expected": {"50": 0.5, "90": 0.9},
                    "spread_skill": 0.8,
                    "residual": 1.02,
                    "errors": {"50": 0.013, "90": 0.0214, "spread_skill": 0.051, "residual": 0.004},
                    "folder": root,
                }
            )
