"""The README's table: every task and base method on the shipped prior, with and without CMI.

    python benchmarks/restoration.py tune    choose step sizes on held-back training images
    python benchmarks/restoration.py cmi     compare CMI settings, paired, on other held-back images
    python benchmarks/restoration.py table   restore the 64 shipped test images, print Markdown

`tune` writes step_sizes.yaml beside this file, `table` reads it. Test images are never tuned on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from cmi_lightning.data import ImageFolderData
from cmi_lightning.data.fashion import NUM_HELD_OUT, FashionMNIST
from cmi_lightning.denoisers import Autocast, Denoiser, shipped_prior
from cmi_lightning.guidance import CMI, DPS, DSG, MCG, Guidance, PiGDM
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import (
    BoxMask,
    Downsample,
    GaussianBlur,
    Identity,
    MotionBlur,
    RandomMask,
)
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM

STEPS = 100
PRECISION = "bf16"  # of the network; --precision
TASKS = {
    "random inpainting 90 %": (RandomMask(0.9), 0.05),
    "box inpainting 14×14": (BoxMask(14, 4), 0.05),
    "Gaussian blur, sd 2": (GaussianBlur(61, 2.0), 0.05),
    "motion blur 9×9": (MotionBlur(9, 0.5, "circular", rcond=0.2), 0.05),
    "super-resolution ×4": (Downsample(4), 0.05),
    "denoising, σ = 0.5": (Identity(), 0.5),
}
# The search space: three values for every method, the published ones among them.
METHODS: dict[str, tuple[type[Guidance], str, list[float]]] = {
    "DPS": (DPS, "scale", [1.0, 2.0, 4.0]),
    "ΠGDM": (PiGDM, "scale", [0.5, 1.0, 2.0]),
    "MCG": (MCG, "scale", [0.5, 1.0, 2.0]),
    "DSG": (DSG, "rate", [0.05, 0.1, 0.2]),
}
CMI_TASKS = ["box inpainting 14×14", "super-resolution ×4"]
STEP_SIZES = Path(__file__).with_name("step_sizes.yaml")


def held_back(start: int, count: int) -> tuple[Tensor, list[str]]:
    """Training images that the prior was not trained on."""
    data = FashionMNIST(train=True)
    items = [data[len(data) - NUM_HELD_OUT + start + i] for i in range(count)]
    return torch.stack([item["x"] for item in items]), [item["id"] for item in items]


def test_images() -> tuple[Tensor, list[str]]:
    """The 64 shipped test images."""
    data = ImageFolderData("fashion-mnist-test", batch_size=64)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    return batch["x"], list(batch["id"])


def unit_range(x: Tensor) -> Tensor:
    """[−1, 1] to [0, 1], clamped and rounded as a saved PNG is."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 255


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Per image, in dB."""
    return torch.stack(
        [
            peak_signal_noise_ratio(a, b, data_range=1.0)
            for a, b in zip(unit_range(x), unit_range(truth), strict=True)
        ]
    )


def ssim(x: Tensor, truth: Tensor) -> Tensor:
    """Per image."""
    return torch.stack(
        [
            structural_similarity_index_measure(a[None], b[None], data_range=1.0)
            for a, b in zip(unit_range(x), unit_range(truth), strict=True)
        ]
    )


class Bench:
    """Restores one set of images; every method sees the same measurements and noise."""

    def __init__(self, images: Tensor, ids: list[str], steps: int = STEPS, batch: int = 32) -> None:
        self.prior: Denoiser = shipped_prior()
        if PRECISION == "bf16":
            self.prior = Autocast(self.prior, torch.bfloat16)
        self.images, self.ids, self.steps, self.batch = images, ids, steps, min(batch, len(images))

    def problem(self, task: str, rows: slice) -> tuple[Problem, SampleNoise, Tensor]:
        operator, sigma = TASKS[task]
        x, noise = self.images[rows], SampleNoise(0, self.ids[rows])
        return Problem.simulate(x, operator.bind((1, 32, 32), noise, x), sigma, noise), noise, x

    def rows(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, len(self.images), self.batch)]

    def measurement(self, task: str) -> Tensor:
        """A⁺y."""
        problems = [self.problem(task, rows)[0] for rows in self.rows()]
        return torch.cat([p.operator.pinv(p.y) for p in problems])

    def restore(self, task: str, guidances: list[Guidance]) -> tuple[Tensor, float, int]:
        """Restored images, seconds per image, and network passes (forwards + vjps) per image."""
        sampler = Sampler(self.prior, DDPM(), guidances, self.steps)
        out, started, passes = [], time.perf_counter(), 0
        for rows in self.rows():
            *_, record = sampler.iterate(*self.problem(task, rows))
            out.append(record.x)
            passes = record.forwards + record.vjps
        return torch.cat(out), (time.perf_counter() - started) / len(self.images), passes


def mean_and_error(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def tune(count: int, tasks: list[str]) -> None:
    bench = Bench(*held_back(0, count))
    chosen: dict[str, dict[str, float]] = {}
    if STEP_SIZES.is_file():
        chosen = yaml.safe_load(STEP_SIZES.read_text())
    for task in tasks:
        print(f"{task}: A⁺y {mean_and_error(psnr(bench.measurement(task), bench.images))}")
        chosen[task] = {}
        for method, (guidance, option, grid) in METHODS.items():
            scores = {}
            for value in grid:
                x, _, _ = bench.restore(task, [guidance(**{option: value})])
                scores[value] = float(psnr(x, bench.images).mean())
            chosen[task][method] = max(scores, key=lambda v: scores[v])
            listed = ", ".join(f"{v:g}: {s:.2f}" for v, s in scores.items())
            print(f"  {method} {option}: {listed} → {chosen[task][method]:g}", flush=True)
        STEP_SIZES.write_text(yaml.safe_dump(chosen, allow_unicode=True, sort_keys=False))


def base(task: str, method: str, sizes: dict[str, Any]) -> list[Guidance]:
    """The guidance of a method with its chosen step size."""
    if method == "none":
        return []
    guidance, option, _ = METHODS[method]
    return [guidance(**{option: sizes[task][method]})]


def cmi(count: int, settings: list[dict[str, Any]], tasks: list[str]) -> None:
    sizes = yaml.safe_load(STEP_SIZES.read_text())
    bench = Bench(*held_back(NUM_HELD_OUT // 2, count))
    for task, method in itertools.product(tasks, METHODS):
        plain, seconds, _ = bench.restore(task, base(task, method, sizes))
        reference, similar = psnr(plain, bench.images), ssim(plain, bench.images)
        print(f"{task}, {method}: {mean_and_error(reference)} dB, {seconds:.2f} s", flush=True)
        for options in settings:
            guided = [CMI(**options), *base(task, method, sizes)]
            x, seconds, passes = bench.restore(task, guided)
            gain, closer = psnr(x, bench.images) - reference, ssim(x, bench.images) - similar
            print(
                f"  {options}: ΔPSNR {mean_and_error(gain)}, ΔSSIM {closer.mean():+.4f} ± "
                f"{closer.std() / len(closer) ** 0.5:.4f}, {passes} passes, {seconds:.2f} s",
                flush=True,
            )


def table(cmi_tasks: list[str]) -> None:
    sizes = yaml.safe_load(STEP_SIZES.read_text())
    bench = Bench(*test_images())
    names = ["A⁺y", *METHODS]
    print("| task | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    below = []
    for task in TASKS:
        y = psnr(bench.measurement(task), bench.images)
        cells, changes = [mean_and_error(y)], ["CMI"]
        for method in METHODS:
            x, _, _ = bench.restore(task, base(task, method, sizes))
            reference = psnr(x, bench.images)
            cells.append(mean_and_error(reference))
            if task in cmi_tasks:
                x, _, _ = bench.restore(task, [CMI(), *base(task, method, sizes)])
                changes.append(mean_and_error(psnr(x, bench.images) - reference))
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)
        if task in cmi_tasks:
            below.append(f"| {task} | " + " | ".join(changes[1:]) + " |")
    if below:
        print("\n| CMI added: ΔPSNR, paired | " + " | ".join(METHODS) + " |")
        print("|---|" + "---:|" * len(METHODS))
        print("\n".join(below))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=["tune", "cmi", "table"])
    parser.add_argument("--count", type=int, default=16, help="held-back images for tune and cmi")
    parser.add_argument(
        "--settings", type=yaml.safe_load, default=[{}], help="CMI options, a YAML list"
    )
    parser.add_argument(
        "--tasks",
        nargs="*",
        choices=list(TASKS),
        help="tasks to tune (default: all); tasks on which cmi and table try CMI (default: two)",
    )
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    args = parser.parse_args()
    global PRECISION
    PRECISION = args.precision
    if args.command == "tune":
        tune(args.count, args.tasks or list(TASKS))
    elif args.command == "cmi":
        cmi(args.count, args.settings, args.tasks or CMI_TASKS)
    else:
        table(CMI_TASKS if args.tasks is None else args.tasks)


if __name__ == "__main__":
    main()
