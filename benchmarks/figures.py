"""The README's pictures.

    python benchmarks/figures.py

docs/demo.png: test garments, their measurements and CMI+DPS restorations on three tasks, with the
step sizes of step_sizes.yaml. docs/samples.png: unconditional samples, DDIM with 100 steps.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from restoration import STEP_SIZES, TASKS, Bench, base, test_images

from cmi_lightning.callbacks.drawing import save_png, tile, to_tile
from cmi_lightning.denoisers import shipped_prior
from cmi_lightning.guidance import CMI
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM

DOCS = Path(__file__).parent.parent / "docs"
SHOWN = ["box inpainting 14×14", "super-resolution ×4", "random inpainting 90 %"]


def demo(count: int = 12) -> None:
    images, ids = test_images()
    bench = Bench(images[:count], ids[:count])
    sizes = yaml.safe_load(STEP_SIZES.read_text())
    rows = [images[:count]]
    for task in SHOWN:
        assert task in TASKS
        restored, _, _ = bench.restore(task, [*base(task, "DPS", sizes), CMI()])
        rows += [bench.measurement(task), restored]
    save_png(tile([[to_tile(x) for x in row] for row in rows]), DOCS / "demo.png")


def samples(count: int = 48, columns: int = 16) -> None:
    like = torch.zeros(count, 1, 32, 32)
    noise = SampleNoise(0, [f"unconditional/{i}" for i in range(count)])
    problem = Problem(like, Identity(), 1.0)  # without a guidance nothing looks at it
    x = Sampler(shipped_prior(), DDIM(), num_steps=100).run(problem, noise, like)
    tiles = [to_tile(image) for image in x]
    grid = [tiles[i : i + columns] for i in range(0, count, columns)]
    save_png(tile(grid), DOCS / "samples.png")


if __name__ == "__main__":
    demo()
    samples()
