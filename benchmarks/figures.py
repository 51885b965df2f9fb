"""The README's pictures.

python benchmarks/figures.py demo       docs/demo.png, from cells of `table -c table/fashion`
python benchmarks/figures.py samples    docs/samples.png: the prior alone, DDIM with 100 steps
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from cmi_lightning.callbacks.drawing import save_png, tile, to_tile
from cmi_lightning.denoisers import shipped_prior
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM

DOCS = Path(__file__).parent.parent / "docs"
CELLS = Path("runs/table/fashion/cells")
SHOWN = ["inpaint_box", "super_resolution", "inpaint_random"]


def demo(count: int = 12) -> None:
    """The table's first images: truth, then measurement and CMI+DPS of each task."""

    def row(task: str, kind: str) -> list[Image.Image]:
        paths = sorted((CELLS / task / "DPS-cmi" / kind).glob("*.png"))[:count]
        return [Image.open(path).convert("L") for path in paths]

    rows = [row(SHOWN[0], "truth")]
    rows += [row(task, kind) for task in SHOWN for kind in ("measurement", "restored")]
    save_png(tile(rows), DOCS / "demo.png")


def samples(count: int = 48, columns: int = 16) -> None:
    like = torch.zeros(count, 1, 32, 32)
    noise = SampleNoise(0, [f"unconditional/{i}" for i in range(count)])
    problem = Problem(like, Identity(), 1.0)  # without a guidance nothing looks at it
    x = Sampler(shipped_prior(), DDIM(), num_steps=100).run(problem, noise, like)
    tiles = [to_tile(image) for image in x]
    grid = [tiles[i : i + columns] for i in range(0, count, columns)]
    save_png(tile(grid), DOCS / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", choices=["demo", "samples"])
    {"demo": demo, "samples": samples}[parser.parse_args().picture]()
