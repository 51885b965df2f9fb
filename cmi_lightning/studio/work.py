"""What the page asks for, as an operator, a restoration, a command and Python code."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmi_lightning import configs
from cmi_lightning import methods as packaged
from cmi_lightning.api import Progress, Restorer
from cmi_lightning.data.pictures import png
from cmi_lightning.errors import InputError
from cmi_lightning.files import write
from cmi_lightning.methods import step_sizes
from cmi_lightning.operators import (
    Downsample,
    GaussianBlur,
    GivenKernel,
    Identity,
    Inpaint,
    Operator,
)
from cmi_lightning.predict.damaged import ESTIMATE

DAMAGES = ("missing", "blurry", "small", "noisy")
MISSING = ("painted", "box", "random")
KERNELS = ("gaussian", "motion", "disc")
SIDES = (64, 128, 192, 256, 384, 512)  # what the longer side is reduced to
LEAST = 16  # pixels of the shorter side
MOST = 2**26  # pixels of an upload
SHOW = 1.0  # seconds between two pictures on the way, each of which takes 40 ms in all: 4 %


@dataclass(frozen=True)
class Choice:
    """All that a person chooses on the page; anything else is refused.

    >>> Choice(damage="small", factor=2).operator(Image.new("RGB", (64, 64)))
    Downsample(factor=2, convention='matlab')

    Raises:
        InputError: for a value that the page does not offer.
    """

    damage: str = "missing"
    missing: str = "painted"
    kernel: str = "gaussian"
    width: float = 2.0  # of the blur, in pixels
    angle: float = 30.0  # of the motion, in degrees
    factor: int = 2
    sigma: float = 0.025
    estimate: bool = False
    sound: bool = True  # the photograph is damaged first
    side: int = 128
    method: str = "pigdm"
    steps: int = 100
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"damage": DAMAGES, "missing": MISSING, "kernel": KERNELS, "side": SIDES}
        for name, known in {**choices, "method": methods()}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(map(str, known))}.")
        bounds = {"width": (0.5, 12), "angle": (0, 180), "factor": (2, 4), "sigma": (0, 0.5)}
        bounds |= {"steps": (1, 1000), "samples": (1, 16), "seed": (0, 2**31)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{name} must be between {low:g} and {high:g}, got {value!r}.")
        for field in fields(self):
            if field.type == "int":
                object.__setattr__(self, field.name, int(getattr(self, field.name)))

    def fitted(self, photograph: Image.Image) -> Image.Image:
        """Return a photograph whose longer side is at most ``side``, in sides that suit the task.

        Raises:
            InputError: if it is too narrow for that.
        """
        width, height = photograph.size
        scale = min(1.0, self.side / max(width, height))
        if self.damage == "small" and not self.sound:
            scale = min(scale, self.side / self.factor / max(width, height))
        unit = self.factor if self.damage == "small" and self.sound else 1
        size = [max(int(n * scale) // unit, 1) * unit for n in (width, height)]
        if min(size) * (1 if self.sound else self._growth) < LEAST:
            raise InputError(f"The photograph is too narrow: {size[0]}×{size[1]} pixels are left.")
        small = photograph.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        return small if size != [width, height] else photograph

    @property
    def _growth(self) -> int:
        return self.factor if self.damage == "small" else 1

    def operator(self, photograph: Image.Image, painted: Image.Image | None = None) -> Operator:
        """Return what damaged a photograph.

        Args:
            photograph: as :meth:`fitted` returns it.
            painted: of the same shape: what is missing has a value above 0.

        Raises:
            InputError: if nothing is painted, or everything is.
        """
        if self.damage == "missing":
            return Inpaint(self.mask(photograph.size, painted))
        if self.damage == "small":
            return Downsample(self.factor)
        if self.damage == "noisy":
            return Identity()
        if self._soft:
            return GaussianBlur(self._size, self.width)
        return GivenKernel(self.kernel_values())

    @property
    def _soft(self) -> bool:
        """Whether the blur has a class of its own; of given photographs it is a kernel."""
        return self.kernel == "gaussian" and self.sound

    @property
    def _size(self) -> int:
        """The side of a Gaussian's kernel."""
        return 2 * math.ceil(4 * self.width) + 1

    def mask(self, size: tuple[int, int], painted: Image.Image | None = None) -> Tensor:
        """Return the known pixels (H, W) of an image of ``size`` (width, height)."""
        width, height = size
        known = torch.ones(height, width, dtype=torch.bool)
        if self.missing == "box":
            known[height // 3 : -(height // 3), width // 3 : -(width // 3)] = False
        elif self.missing == "random":
            order = torch.randperm(known.numel(), generator=torch.manual_seed(self.seed))
            known.view(-1)[order[: round(0.9 * known.numel())]] = False
        elif painted is not None:
            reduced = painted.convert("L").resize(size, Image.Resampling.BOX)
            known = torch.from_numpy(np.array(reduced)) == 0
        if bool(known.all()):
            raise InputError("Nothing is painted: paint over what is missing, or choose a box.")
        if not bool(known.any()):
            raise InputError("Everything is painted: leave something to restore from.")
        return known

    def kernel_values(self) -> Tensor:
        """Return the blur's kernel (k, k), of sum 1."""
        half = max(1, math.ceil(4 * self.width if self.kernel == "gaussian" else 2 * self.width))
        at = torch.arange(-half, half + 1, dtype=torch.float32)
        y, x = torch.meshgrid(at, at, indexing="ij")
        if self.kernel == "gaussian":
            values = torch.exp(-(x**2 + y**2) / (2 * self.width**2))
        elif self.kernel == "disc":
            values = (self.width + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1)
        else:
            cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
            along, across = (x * cos - y * sin).abs(), (x * sin + y * cos).abs()
            values = (self.width + 0.5 - along).clamp(0, 1) * (1 - across).clamp(0, 1)
        return values / values.sum()

    def files(
        self, folder: Path, photograph: Image.Image, painted: Image.Image | None = None
    ) -> list[Path]:
        """Write what the command and the code read: the photograph, and its mask or kernel.

        Args:
            folder: where; made if absent.
            photograph: as it was opened.
            painted: see :meth:`operator`.
        """
        small = self.fitted(photograph.convert("RGB"))
        contents = {"photographs/photograph.png": png(small)}
        if self.damage == "missing":
            known = np.uint8(255) * self.mask(small.size, painted).numpy()
            contents["mask.png"] = png(Image.fromarray(known))
        if self.damage == "blurry" and not self._soft:
            buffer = io.BytesIO()
            np.save(buffer, self.kernel_values().numpy())
            contents["kernel.npy"] = buffer.getvalue()
        for name, content in contents.items():
            write(folder / name, content)
        return [folder / name for name in contents]

    def as_command(self) -> str:
        """Return the command that does the same, beside the files of :meth:`files`."""
        base, _, cmi = self.method.partition("+")
        kind = "guidance" if configs.find(f"guidance/{base}") else "solver"
        words = ["cmi-lightning predict", f"-c {kind}/{base}", *(["-c add_cmi"] if cmi else [])]
        operator = "--model.operator"
        if self.sound:
            words += ["--data.folder photographs/"]
            words += {
                "missing": [f"{operator} Inpaint", f"{operator}.mask mask.png"],
                "blurry": [f"{operator} GivenKernel", f"{operator}.kernels kernel.npy"],
                "small": [f"{operator} Downsample", f"{operator}.factor {self.factor}"],
                "noisy": [f"{operator} Identity"],
            }[self.damage]
            if self.damage == "blurry" and self._soft:
                words[-2:] = [f"{operator} GaussianBlur", f"{operator}.kernel_size {self._size}"]
                words += [f"{operator}.sd {self.width:g}"]
        else:
            words += ["--data MeasurementFolderData", "--data.measurements photographs/"]
            words += {
                "missing": ["--data.kind inpaint", "--data.masks mask.png"],
                "blurry": ["--data.kind blur", "--data.kernels kernel.npy"],
                "small": ["--data.kind downsample", f"--data.factor {self.factor}"],
                "noisy": ["--data.kind denoise"],
            }[self.damage]
        sizes = step_sizes(self._stand_in()).items()
        words += [f"--step_sizes.{name} {size:g}" for name, size in sizes]
        if self.estimates:
            words += ["--data.sigmas estimate"]
        else:
            words += [f"--model.noise.sigma {self.sigma:g}", "--model.noise.range unit"]
        words += [f"--model.num_steps {self.steps}", f"--model.seed {self.seed}"]
        words += [f"--model.samples_per_image {self.samples}"] if self.samples > 1 else []
        return " \\\n  ".join(words)

    @property
    def estimates(self) -> bool:
        """Whether the noise is estimated: that of a sound photograph is the one added."""
        return self.estimate and not self.sound

    def _stand_in(self) -> Operator:
        """Return an operator of the same class."""
        return replace(self, missing="box").operator(Image.new("RGB", (64, 64)))

    def as_python(self) -> str:
        """Return the code that does the same, beside the files of :meth:`files`."""
        made = {
            "missing": 'Inpaint("mask.png")',
            "blurry": 'GivenKernel("kernel.npy")',
            "small": f"Downsample({self.factor})",
            "noisy": "Identity()",
        }[self.damage]
        if self.damage == "blurry" and self._soft:
            made = f"GaussianBlur({self._size}, {self.width:g})"
        sigma = f'"{ESTIMATE}"' if self.estimates else f"{self.sigma:g}"
        options = [f'method="{self.method}"', f"steps={self.steps}", f"sigma={sigma}"]
        options += [f"samples={self.samples}"] * (self.samples > 1) + [f"seed={self.seed}"]
        options += ["simulate=True"] * self.sound
        return (
            "from cmi_lightning import restore\n"
            f"from cmi_lightning.operators import {made.partition('(')[0]}\n\n"
            f'result = restore("photographs/photograph.png", {made},\n'
            f"                 {', '.join(options)})\n"
            'result.save("restored")\n'
        )


@cache
def methods() -> tuple[str, ...]:
    """Return the methods that the page offers; the paper's four bases also with CMI.

    >>> "dps+cmi" in methods()
    True
    """
    bases = ("dps", "pigdm", "mcg", "dsg")
    return (*(f"{name}{more}" for name in bases for more in ("", "+cmi")),
            *(name for name in packaged.methods() if name not in bases))  # fmt: skip


def restore(
    choice: Choice, photograph: Image.Image, painted: Image.Image | None = None
) -> Iterator[Progress]:
    """Yield the steps of a restoration, at most one in ``SHOW`` seconds, and the last.

    Raises:
        InputError: in one sentence, for what cannot be restored.
    """
    small = choice.fitted(photograph.convert("RGB"))
    operator = choice.operator(small, painted)
    restorer = Restorer(_prior(), choice.method, steps=choice.steps)
    sigma = ESTIMATE if choice.estimates else choice.sigma
    shown = -math.inf
    options: dict[str, Any] = dict(samples=choice.samples, seed=choice.seed, simulate=choice.sound)
    for step in restorer.steps(small, operator, sigma=sigma, name="photograph", **options):
        if step.result is not None or time.monotonic() - shown >= SHOW:
            shown = time.monotonic()
            yield step


@cache
def _prior() -> Any:
    from cmi_lightning.denoisers import shipped_prior

    return shipped_prior("photos-64")
