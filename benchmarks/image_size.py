"""Windows against the whole image: PSNR, LPIPS, memory and time of photos-64 by image size.

    python benchmarks/image_size.py FOLDER                 every case, as a Markdown table
    python benchmarks/image_size.py FOLDER --sides 64 128 --images 2

FOLDER holds the package's photographs (docs/photos.md); squares of the validation photographs are
scaled to each side. Each case runs in a process of its own: DPS of scale side/16 or ΠGDM, 100
steps, 90 % of the pixels missing, σ = 0.05, one image at a time. "whole" gives the convolutional
network the whole image; "tiled" gives it windows of 64 pixels that overlap by 16. Memory is the
growth of the largest resident set over the process with its network; seconds are of CPU, on one
thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import peak
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from cmi_lightning.callbacks.networks import Alex
from cmi_lightning.data.crops import PHOTOGRAPHS, crop
from cmi_lightning.data.pictures import psnr
from cmi_lightning.denoisers import Denoiser, Tiled, shipped_prior
from cmi_lightning.guidance import DPS, Guidance, PiGDM
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import RandomMask
from cmi_lightning.problem import Problem
from cmi_lightning.sampler import Sampler
from cmi_lightning.solvers import DDPM


def photographs(folder: Path, side: int, count: int) -> dict[str, torch.Tensor]:
    """Return the central squares of validation photographs, (1, 3, side, side) in [−1, 1]."""
    with open(PHOTOGRAPHS, newline="", encoding="utf-8") as file:
        names = [row["photo"] for row in csv.DictReader(file) if row["split"] == "validation"]
    squares = {}
    for name in names[:: max(1, len(names) // count)][:count]:
        photo = Image.open(folder / name).convert("RGB")
        edge = min(photo.size)
        x, y = ((n - edge) // 2 for n in photo.size)
        squares[name] = pil_to_tensor(crop(photo, x, y, edge, side))[None] / 127.5 - 1
    return squares


def measure(
    folder: Path, side: int, tiled: bool, count: int, guidance: Guidance
) -> dict[str, float]:
    """Restore the squares of one side; return means over them."""
    torch.set_num_threads(1)
    prior: Denoiser = shipped_prior("photos-64")
    if tiled:
        prior = Tiled(prior, size=64, overlap=16)
    sampler = Sampler(prior, DDPM(), [guidance], num_steps=100)
    lpips = Alex().read(Alex.source.locate(None, fetch=True))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is resident now
    before, rows = peak("cpu"), []
    for name, x in photographs(folder, side, count).items():
        noise = SampleNoise(0, [name])
        problem = Problem.simulate(x, RandomMask(0.9), 0.05, noise)
        started = time.process_time()
        restored = sampler.run(problem, noise, x).clamp(-1, 1)
        seconds, memory = time.process_time() - started, peak("cpu") - before
        rows.append((psnr(restored, x), lpips(restored, x).mean(), seconds, memory))
    quality, distance, seconds, memory = (
        torch.tensor([float(v) for v in c]) for c in zip(*rows, strict=True)
    )
    return {
        "psnr": float(quality.mean()),
        "lpips": float(distance.mean()),
        "seconds": float(seconds.mean()),
        "mib": float(memory.max()),
    }


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--guidance", choices=["dps", "pigdm"], default="dps")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        side, how = options.case
        guidance = DPS(int(side) / 16) if options.guidance == "dps" else PiGDM()
        print(
            json.dumps(measure(options.folder, int(side), how == "tiled", options.images, guidance))
        )
        return
    print("| side | network sees | PSNR, dB | LPIPS | CPU seconds an image | memory, MiB |")
    print("|---:|---|---:|---:|---:|---:|")
    for side in options.sides:
        for how in ("whole", "tiled"):
            command = [sys.executable, __file__, *sys.argv[1:], "--case", str(side), how]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            print(
                f"| {side} | {how} | {found['psnr']:.2f} | {found['lpips']:.3f} | "
                f"{found['seconds']:.1f} | {found['mib']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
