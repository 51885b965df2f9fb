"""Makes the shipped photographs and crops from Debian's package endless-sky-high-dpi 0.9.8-1.

    apt-get download endless-sky-high-dpi && dpkg-deb -x endless-sky-high-dpi_*.deb sky
    python benchmarks/photos.py sky/usr/share/games/endless-sky/plugins/endless-sky-high-dpi

The package's folder ``images/land`` is also what ``cmi-lightning fit -c fit/photos`` trains on.
Writes to cmi_lightning/assets/photos: 24 of the 32 test photographs, chosen by eye for variety
before anything was restored, and all 16 validation photographs, as JPEG of 256×192; and five
crops of 64×64 of each, as PNG.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from PIL import Image

from cmi_lightning.data.crops import PHOTOGRAPHS, crop, five_squares

TEST = [
    "badlands3",
    "badlands4",
    "beach1",
    "beach2",
    "beach3",
    "canyon5",
    "fields1",
    "fields3",
    "fields7",
    "forest1",
    "mountain3",
    "mountain5",
    "sea1",
    "sea3",
    "sea7",
    "sea8",
    "sky0",
    "snow0",
    "snow8",
    "valley2",
    "valley6",
    "valley8",
    "water2",
    "water8",
]


def stem(photo: str) -> str:
    """Return the name under which a photograph is shipped."""
    return photo.removesuffix(".jpg").removesuffix("@2x")


def main() -> None:
    """Write the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    land = parser.parse_args().package / "images" / "land"
    with open(PHOTOGRAPHS, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] != "train"]
    for row in rows:
        name, split = stem(row["photo"]), row["split"]
        if split == "test" and name not in TEST:
            continue
        photo = Image.open(land / row["photo"]).convert("RGB")
        width, height = photo.size
        across = height * 4 // 3
        left = (width - across) // 2
        small = photo.resize(
            (256, 192), Image.Resampling.LANCZOS, box=(left, 0, left + across, height)
        )
        folder = PHOTOGRAPHS.parent
        (folder / split).mkdir(exist_ok=True)
        small.save(folder / split / f"{name}.jpg", quality=95, subsampling=0, optimize=True)
        for i, (x, y, side) in enumerate(five_squares(width, height)):
            crops = folder / f"{split}-64" / str(i)  # the first crops are of all photographs
            crops.mkdir(parents=True, exist_ok=True)
            crop(photo, x, y, side, 64).save(crops / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
