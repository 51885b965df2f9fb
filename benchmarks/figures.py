"""The README's pictures.

python benchmarks/figures.py demo       docs/demo.png: photographs, damaged and restored (minutes)
python benchmarks/figures.py samples    docs/samples.png: the garments' prior alone, DDIM, 100 steps
python benchmarks/figures.py nearest LAND    docs/photos.png: the photographs' prior alone, DDPM,
    250 steps, over the nearest of 40,000 training crops; LAND: see docs/photos.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from cmi_lightning.callbacks.drawing import save_png, tile, to_tile
from cmi_lightning.cli import main
from cmi_lightning.data.crops import PhotoCropsData
from cmi_lightning.denoisers import shipped_prior
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Identity
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDIM, DDPM

DOCS = Path(__file__).parent.parent / "docs"
SHOWN = {
    "inpaint_random": "90 % missing",
    "gaussian_blur": "blurred",
    "super_resolution": "quarter size",
}


def labelled(picture: Image.Image, labels: list[str], width: int = 200) -> Image.Image:
    """Return a picture with a label to the left of each of its equally high rows."""
    canvas = Image.new("RGB", (width + picture.width, picture.height), "white")
    canvas.paste(picture, (width, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(27)
    height = picture.height / len(labels)
    for i, label in enumerate(labels):
        draw.text((width - 14, (i + 0.5) * height), label, "black", font, anchor="rm")
    return canvas


def demo(count: int = 8) -> None:
    """The demo's photographs: truth, then measurement and CMI+DPS of each task."""
    rows, labels = [], ["truth"]
    for task, label in SHOWN.items():
        folder = Path("runs/figures") / task
        command = ["predict", "-c", "demo", "-c", f"task/{task}", "-c", "table/cells"]
        if main([*command, f"--trainer.default_root_dir={folder}"]):
            raise SystemExit(f"{task} failed")
        for kind in ("truth", "measurement", "restored")[bool(rows) :]:
            paths = sorted((folder / kind).glob("*.png"))[:count]
            rows.append([Image.open(path).convert("RGB") for path in paths])
        labels += [label, "restored"]
    save_png(labelled(tile(rows), labels), DOCS / "demo.png")


def samples(count: int = 48, columns: int = 16) -> None:
    like = torch.zeros(count, 1, 32, 32)
    noise = SampleNoise(0, [f"unconditional/{i}" for i in range(count)])
    problem = Problem(like, Identity(), 1.0)  # without a guidance nothing looks at it
    x = Sampler(shipped_prior("fashion-mnist"), DDIM(), num_steps=100).run(problem, noise, like)
    tiles = [to_tile(image) for image in x]
    grid = [tiles[i : i + columns] for i in range(0, count, columns)]
    save_png(tile(grid), DOCS / "samples.png")


def nearest(land: Path, count: int = 12, crops: int = 40_000) -> None:
    """Draws from the photographs' prior, each over the training crop of least mean square."""
    like = torch.zeros(count, 3, 64, 64)
    noise = SampleNoise(0, [f"unconditional/{i}" for i in range(count)])
    problem = Problem(like, Identity(), 1.0)  # without a guidance nothing looks at it
    x = Sampler(shipped_prior("photos-64"), DDPM(), num_steps=250).run(problem, noise, like)
    data = PhotoCropsData(land, crops_per_epoch=crops)
    data.setup("fit")
    least, best = torch.full((count,), torch.inf), torch.zeros_like(x)
    for loaded in data.train_dataloader():
        for candidate in (loaded["x"], loaded["x"].flip(-1)):
            found, index = torch.cdist(x.flatten(1), candidate.flatten(1)).min(1)
            closer = found < least
            least[closer], best[closer] = found[closer], candidate[index[closer]]
    print("RMS distance:", ", ".join(f"{d / like[0].numel() ** 0.5:.3f}" for d in least))
    tiles = [[to_tile(image) for image in row] for row in (x, best)]
    save_png(labelled(tile(tiles), ["drawn", "nearest crop"]), DOCS / "photos.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", choices=["demo", "samples", "nearest"])
    parser.add_argument("land", type=Path, nargs="?", help="folder of the photographs, for nearest")
    options = parser.parse_args()
    if options.picture == "nearest":
        nearest(options.land or parser.error("nearest needs the folder of the photographs"))
    else:
        {"demo": demo, "samples": samples}[options.picture]()
