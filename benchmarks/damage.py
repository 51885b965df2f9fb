"""Photographs damaged by what the package does not simulate, restored from the command line.

    python benchmarks/damage.py                                    three landscapes
    python benchmarks/damage.py --bird bird.png --fish fish.png    and two pictures of animals

Writes the damaged pictures, masks and kernels to runs/damage, restores them by the commands of
docs/guides/damage.md, prints PSNR before and after, and draws the landscapes: docs/damage.jpg.
The animals are `erase_268` and `categorization_069` of Debian's package gcompris-qt-data 3.1-2.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cmi_lightning.cli import main
from cmi_lightning.data.pictures import Picture, psnr
from cmi_lightning.paths import example

ESTIMATED = "--data.sigmas estimate"
ROOT, DOCS = Path("runs/damage"), Path(__file__).parent.parent / "docs"


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return what is left of an image after JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scan(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return a print with scratches, dust and a crease, and the mask that a brush of 5 paints."""
    damaged, mask = image.copy(), Image.new("L", image.size, 255)
    (width, height), pens = image.size, (ImageDraw.Draw(damaged), ImageDraw.Draw(mask))
    for _ in range(9):  # scratches, with a bend
        points = [tuple(rng.integers(0, (width, height))) for _ in range(3)]
        pens[0].line(points, tuple(rng.integers(190, 255, 3)), 2)
        pens[1].line(points, 0, 5)
    for x, y in rng.integers(4, (width - 4, height - 4), (40, 2)).tolist():  # dust
        pens[0].ellipse((x - 2, y - 1, x + 2, y + 1), "black")
        pens[1].ellipse((x - 4, y - 3, x + 4, y + 3), 0)
    pens[0].line([(0, height * 0.7), (width, height * 0.6)], "white", 6)  # a crease
    pens[1].line([(0, height * 0.7), (width, height * 0.6)], 0, 10)
    return damaged, mask


def defocus(image: Image.Image, radius: float, rng: np.random.Generator) -> Image.Image:
    """Return a phone's picture: a disc's blur of linear light, photon noise, JPEG of 90."""
    linear = (np.asarray(image, np.float64) / 255) ** 2.2
    r = np.hypot(*np.mgrid[-4:5, -4:5])
    disc = np.clip(radius + 0.5 - r, 0, 1)
    padded = np.pad(linear, ((4, 4), (4, 4), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9), (0, 1))
    counts = rng.poisson(3000 * np.einsum("hwcij,ij->hwc", windows, disc / disc.sum()))
    return jpeg(Image.fromarray((255 * np.clip(counts / 3000, 0, 1) ** (1 / 2.2)).astype("u1")), 90)


def watermark(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return a picture with half-transparent words, and a mask a little wider than they are."""
    words = Image.new("L", image.size)
    pen, font = ImageDraw.Draw(words), ImageFont.load_default(34)
    for y in range(10, image.height, 62):
        pen.text((12 + y // 3, y), "DO NOT COPY", 150, font)
    mask = words.filter(ImageFilter.MaxFilter(5)).point(lambda v: 0 if v else 255)
    return Image.composite(Image.new("RGB", image.size, "white"), image, words), mask


def gaussian(sd: float) -> np.ndarray:
    """Return the kernel that a person guesses for a blurred picture."""
    k = np.exp(-(np.arange(-9, 10) ** 2) / (2 * sd**2))
    return np.outer(k, k) / k.sum() ** 2


def given(sigma: float) -> list[str]:
    """Return the option that sets the noise."""
    return ["--model.noise", f"{{sigma: {sigma}, range: signed}}"]


def restore(name: str, y: Image.Image, options: list[str], **files: object) -> Image.Image:
    """Write a case's files, run its command, return what it restored."""
    folder = ROOT / name
    (folder / "broken").mkdir(parents=True, exist_ok=True)
    y.save(folder / "broken" / "photo.png")
    for key, value in files.items():
        path = folder / f"{key}.{'npy' if isinstance(value, np.ndarray) else 'png'}"
        np.save(path, value) if isinstance(value, np.ndarray) else value.save(path)
        options = [*options, f"--data.{key}", str(path)]
    command = ["-q", "predict", "-c", "guidance/pigdm", "--data", "MeasurementFolderData"]
    command += ["--data.measurements", str(folder / "broken"), *options]
    command += [f"--trainer.default_root_dir={folder / 'run'}"]
    if main(command):
        raise SystemExit(f"{name} failed")
    with open(folder / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    print(
        f"{name}: σ = {row.get('sigma', 'given')}, residual {float(row['residual']):.2f}, "
        f"noise alone {float(row['expected_residual']):.2f}"
    )
    return Image.open(folder / "run" / "restored" / "photo.png").convert("RGB")


def run(bird: Path | None, fish: Path | None) -> None:
    """Damage, restore, measure and draw."""
    rng, cases = np.random.default_rng(0), []

    def case(name, truth, y, options, more=(), **files):  # type: ignore[no-untyped-def]
        restored = restore(name, y, [*options.split(), *more], **files)
        seen = y.resize(truth.size, Image.Resampling.BICUBIC)
        x, *others = (Picture.of(image).x for image in (truth, seen, restored))
        before, after = (float(psnr(other, x)) for other in others)
        print(f"{name}: {before:.1f} dB damaged, {after:.1f} restored")
        if truth in photo.values():  # others' licences forbid
            cases.append((name, truth, seen, restored))

    photo = {n: Image.open(example(n)).convert("RGB") for n in ("valley2", "water2", "fields1")}
    y = jpeg(photo["valley2"], 20)
    kind = "--data.kind denoise"
    case("JPEG of quality 20, noise estimated", photo["valley2"], y, f"{kind} {ESTIMATED}")
    case("JPEG of quality 20, noise 0.06", photo["valley2"], y, kind, given(0.06))
    y, mask = scan(photo["water2"], rng)
    case("scratched scan", photo["water2"], y, "--data.kind inpaint", masks=mask)
    y = defocus(photo["fields1"], 2.0, rng)
    truth, kind, kernel = photo["fields1"], "--data.kind blur", gaussian(1.2)
    case("out of focus, noise estimated", truth, y, f"{kind} {ESTIMATED}", kernels=kernel)
    case("out of focus, noise 0.05", truth, y, kind, given(0.05), kernels=kernel)
    if bird is not None:
        truth = Image.open(bird).convert("RGB").resize((256, 192), Image.Resampling.BICUBIC)
        small = jpeg(truth.resize((128, 96), Image.Resampling.BICUBIC), 95)
        case("thumbnail of a bird", truth, small, "--data.kind downsample --data.factor 2")
    if fish is not None:
        truth = Image.open(fish).convert("RGB").resize((256, 192), Image.Resampling.BICUBIC)
        y, mask = watermark(truth)
        case("watermark on a fish", truth, y, "--data.kind inpaint", masks=mask)
    draw(cases)


def draw(cases: list) -> None:
    """Draw the cases: the truth, what came, what was restored."""
    width, height = 256, 192
    canvas = Image.new("RGB", (3 * width, len(cases) * (height + 22)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for row, (name, truth, seen, restored) in enumerate(cases):
        top = row * (height + 22) + 22
        pen.text((4, top - 20), f"{name}: truth, damaged, restored", "black", font)
        for column, image in enumerate((truth, seen, restored)):
            canvas.paste(image, (column * width, top))
    canvas.save(DOCS / "damage.jpg", quality=88)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bird", type=Path)
    parser.add_argument("--fish", type=Path)
    run(**vars(parser.parse_args()))
