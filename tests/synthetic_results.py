"""Results as `cmi-lightning table` makes them, with images, for the tests of the report."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import cmi_lightning
from cmi_lightning.report.results import (
    ADDED,
    Cell,
    Difference,
    Draws,
    Metric,
    Results,
    Search,
    Trial,
    Variant,
)
from cmi_lightning.statistics import Estimate

GARMENTS = Path(cmi_lightning.__file__).parent / "assets" / "fashion_mnist_test"
TASKS = {
    "inpaint_random": "random inpainting, 90 %",
    "inpaint_box": "box inpainting, 14×14",
    "gaussian_blur": "Gaussian blur",
    "motion_blur": "motion blur",
    "super_resolution": "super-resolution ×4",
    "denoise": "denoising, σ = 0.4",
}
DRAWN = (("inpaint_random", "DPS"), ("super_resolution", "DPS"))
METHODS = ("none", "DPS", "ΠGDM", "MCG", "DSG")
METRICS = (
    Metric("psnr", "PSNR", "dB", "higher", 2, True),
    Metric("ssim", "SSIM", "", "higher", 3, True),
    Metric("perceptual", "perceptual distance (garment classifier)", "", "lower", 3, True),
    Metric("frechet", "Fréchet distance (garment classifier features)", "", "lower", 2, False),
    Metric("kernel", "kernel distance (garment classifier features)", "", "lower", 3, False),
)
NOTES = (
    "30 comparisons are made of each metric. A difference counts as significant after Holm's "
    "correction over them (family-wise 5 %), each metric and each kind of comparison for itself.",
    "The rows of equal cost have the step sizes that were chosen for 100 steps; nothing was "
    "searched for their longer runs.",
    "Fréchet and kernel distances over 200 images are biased upwards; compare them only within "
    "this table.",
)
LEVEL = {"psnr": 19.0, "ssim": 0.62, "perceptual": 0.41, "frechet": 6.2, "kernel": 0.12}
SPREAD = {"psnr": 0.35, "ssim": 0.012, "perceptual": 0.02, "frechet": 0.9, "kernel": 0.02}


def synthetic_results(
    folder: Path,
    tasks: int = 6,
    methods: int = 5,
    images: int = 200,
    examples: int = 3,
    variants: Sequence[Variant] = ("base", "cmi", "equal"),
) -> Results:
    """Return made-up results, and write their PNG files into a folder."""
    rng = np.random.default_rng(7)
    keys, names = list(TASKS)[:tasks], METHODS[:methods]
    study = {task: _study(rng, names) for task in keys}
    cells: list[Cell] = []
    shown: dict[str, tuple[str, ...]] = {}
    for t, task in enumerate(keys):
        for m, method in enumerate(names):
            for variant in variants:
                made = _cell(rng, task, method, variant, t, m, images)
                if (task, method) in DRAWN and variant in variants[:2]:
                    made = replace(made, draws=_draws(folder, made, examples))
                cells.append(made)
        shown[task] = tuple(
            _example(folder, rng, task, names, variants, i) for i in range(examples)
        )
    return Results(
        title="CMI on Fashion-MNIST",
        command="cmi-lightning table -c table/fashion",
        commit="b22d4e5f00",
        created="2026-11-24 15:30 UTC",
        config="images: 200\nmodel:\n  num_steps: 100\n",
        environment={"cmi-lightning": "0.1.0", "torch": "2.14.1", "python": "3.12.3"},
        images=images,
        steps=100,
        notes=NOTES,
        study=study,
        objective="psnr",
        protocol={"psnr": "10 log₁₀(4 / MSE) per image on [−1, 1], clamped, then the mean."},
        metrics=METRICS,
        tasks={key: TASKS[key] for key in keys},
        methods=names,
        cells=tuple(cells),
        measured={
            task: {"psnr": Estimate(12.1 + t, 0.21), "ssim": Estimate(0.31, 0.01)}
            for t, task in enumerate(keys)
        },
        examples=shown,
    )


def _cell(
    rng: np.random.Generator, task: str, method: str, variant: Variant, t: int, m: int, images: int
) -> Cell:
    word = {"base": "{}", "cmi": "CMI+{}", "descent": "descent+{}", "equal": "{}, equal passes"}
    metrics: dict[str, Estimate] = {}
    paired: dict[str, Difference] = {}
    against: dict[str, Difference] = {}
    for metric in METRICS:
        base = LEVEL[metric.key] * (1 + 0.05 * math.sin(t + 2 * m))
        spread = metric.sign * SPREAD[metric.key]
        centre = {"cmi": rng.normal(0.1, 0.5), "equal": 1.4}.get(variant, 0.0)
        values = spread * (centre + rng.normal(0, 1.6, images))
        mean = float(values.mean()) if variant != "base" else 0.0
        metrics[metric.key] = Estimate(base + mean, 0.02 * base if metric.per_image else None)
        paired[metric.key] = _difference(values, metric)
        against[metric.key] = _difference(values - 1.4 * spread, metric)
    steps = 100 if variant != "equal" else 310
    return Cell(
        task=task,
        method=method,
        variant=variant,
        label="CMI alone" if (variant, method) == ("cmi", "none") else word[variant].format(method),
        steps=steps,
        images=images,
        failed=2 if (t, m, variant) == (1, 3, "cmi") else 0,
        options={"step_sizes.dps": 4.0},
        metrics=metrics,
        passes={"base": 200.0, "equal": 620.0}.get(variant, 618.4),
        seconds={"base": 0.61, "equal": 1.94}.get(variant, 2.13),
        folder=_folder(task, method, variant),
        curves=_curves(rng, method, variant, steps),
        differences=({"base": paired} if variant != "base" else {})
        | ({"equal": against} if variant in ADDED else {}),
    )


def _difference(values: np.ndarray, metric: Metric) -> Difference:
    mean, se = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    p = math.erfc(abs(mean / se) / math.sqrt(2))
    return Difference(
        difference=mean,
        low=mean - 1.96 * se,
        high=mean + 1.96 * se,
        p=p,
        pairs=len(values),
        significant=p < 0.05 / 60,
        improved=float((metric.sign * values > 0).mean()) if metric.per_image else None,
        values=_by_id(metric.sign * values, values) if metric.per_image else {},
    )


def _by_id(gains: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Name the best image 00000, the worst 00001, the next best 00002, …: the first have files."""
    order = np.argsort(-gains)
    ranked = np.stack([order, order[::-1]], axis=1).ravel()[: len(order)]
    names = dict(zip(ranked.tolist(), (f"{i:05d}" for i in range(len(order))), strict=True))
    return {names[k]: value for k, value in enumerate(values.tolist())}


def _study(rng: np.random.Generator, methods: Sequence[str]) -> dict[str, Search]:
    """What was tried: DPS is at the edge, ΠGDM breaks an image, CMI+DPS is better without CMI."""
    tried: dict[str, tuple[dict[str, float | None], float, float, bool]] = {
        "DPS": ({"0.5": 18.0, "1": 18.32, "2": 18.42, "4": 18.59}, 4.0, 4.0, True),
        "ΠGDM": ({"0.25": 13.74, "0.5": 16.53, "1": 17.62, "2": None}, 1.0, 1.0, False),
        "CMI+none": ({"0": 9.72, "0.01": 9.73, "0.03": 9.86, "0.1": 9.66}, 0.03, 0.03, False),
        "CMI+DPS": ({"0": 18.59, "0.01": 18.51, "0.03": 18.52, "0.1": 18.5}, 0.0, 0.03, False),
    }

    def trial(mean: float | None) -> Trial:
        return Trial(mean, None, 9) if mean is None else Trial(mean, 0.6 + 0.2 * rng.random(), 12)

    found = {
        name: Search({value: trial(mean) for value, mean in means.items()}, *outcome)
        for name, (means, *outcome) in tried.items()
    }
    return {name: e for name, e in found.items() if name.removeprefix("CMI+") in methods}


def _curves(
    rng: np.random.Generator, method: str, variant: str, steps: int
) -> dict[str, dict[int, float]]:
    n = np.arange(1, steps + 1)
    level = 1 + 0.3 * rng.random()
    curves = {"residual": (n, level * (1200 * np.exp(-n / 9) + 3 + 5 * np.exp(-n / 60)))}
    if method != "none":
        curves[f"sample/{method}"] = n, level * 4 * np.exp(-n / 50)
    if variant in ADDED:
        late = n[(n > 15) & (n % 2 == 0)]
        curves["cmi/value"] = late, level * 140 * np.exp(-(((late - 70) / 40) ** 2))
        curves["cmi/gradient"] = late, level * 20 * np.exp(-late / 60)
        curves["step/CMI"] = late, level * 0.1 * np.exp(-late / 80)
    return {q: dict(zip(at.tolist(), v.tolist(), strict=True)) for q, (at, v) in curves.items()}


def _save(folder: Path, path: str, pixels: np.ndarray) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / path)


def _garment(i: int) -> np.ndarray:
    return np.asarray(Image.open(GARMENTS / f"{i:05d}.png"), dtype=float)


def _example(
    folder: Path,
    rng: np.random.Generator,
    task: str,
    methods: Sequence[str],
    variants: Sequence[Variant],
    i: int,
) -> str:
    """Write an image's files, as the runs of the cells would, and return its id."""
    name, truth = f"{i:05d}", _garment(i)
    small = truth[::4, ::4] if task == "super_resolution" else truth
    measured = small + rng.normal(0, 60, small.shape)
    for method in methods:
        for variant, noise in zip(variants, (25, 18, 14, 10), strict=False):
            pixels = truth + rng.normal(0, noise, truth.shape)
            _save(folder, f"{_folder(task, method, variant)}/restored/{name}.png", pixels)
    first = _folder(task, methods[0], "base")
    _save(folder, f"{first}/truth/{name}.png", truth)
    _save(folder, f"{first}/measurement/{name}.png", measured)
    return name


def _folder(task: str, method: str, variant: str) -> str:
    return f"cells/{task}/{method}-{variant}"


def _draws(folder: Path, cell: Cell, count: int) -> Draws:
    root = f"posterior/{cell.task}/DPS/{cell.variant}"
    for i in range(count):
        truth = _garment(i)
        _save(folder, f"{root}/restored/{i:05d}.png", truth * 0.95)
        _save(folder, f"{root}/std/{i:05d}.png", 40 + 60 * np.abs(np.gradient(truth)[0]) / 128)
    return Draws(
        images=16,
        draws=16,
        coverage={"50": Estimate(0.41, 0.013), "90": Estimate(0.80, 0.0214)},
        expected={"50": 0.5, "90": 0.9},
        spread_skill=Estimate(0.8, 0.051),
        residual=Estimate(1.02, 0.004),
        white=0.5,
        folder=root,
    )
