"""One photograph, restored by every method: docs/methods/*.png, 64×64 pixels each.

    python benchmarks/method_pictures.py              all methods, some minutes of one core
    python benchmarks/method_pictures.py solver/ddrm  these

The first test photograph under a box of 28×28 pixels, σ = 0.05, 50 levels, every method as its
section of configs/ has it, on the prior photos-64.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor
from torchvision.utils import save_image

from cmi_lightning import configs
from cmi_lightning.predict.options import prediction_cli

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
PLAIN = ("none", "ddpm", "ddim", "heun", "euler", "dpm", "dpm_sde")  # draws of the prior
STEPS = 50


def save(image: Tensor, name: str) -> None:
    """Write an image (C, H, W) in [−1, 1]."""
    FOLDER.mkdir(exist_ok=True)
    save_image((image.clamp(-1, 1) + 1) / 2, FOLDER / f"{name}.png")


def restore(name: str) -> None:
    """Restore the photograph by a section, and write its picture."""
    given = ["-c", "task/inpaint_box", "-c", name, "--data.limit=1", f"--model.num_steps={STEPS}"]
    cli = prediction_cli(given)
    cli.datamodule.setup("predict")
    batch = next(iter(cli.datamodule.predict_dataloader()))
    result = cli.model.predict_step(batch)
    save(result["restored"][0], name.replace("/", "-"))
    save(batch["x"][0], "truth")
    save(result["measurement"][0], "measurement")


def main() -> None:
    sections = [n for n in configs.summaries() if n.startswith(("guidance/", "solver/"))]
    for name in sys.argv[1:] or [n for n in sections if n.split("/")[1] not in PLAIN]:
        restore(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
