"""What one call of `restore` gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmi_lightning.data.pictures import Picture, as_images, data_url, png
from cmi_lightning.errors import counted
from cmi_lightning.files import make_folder, write
from cmi_lightning.paths import inside
from cmi_lightning.predict.restoration import Restoration, misfit

WHITE_STD = 0.5  # the standard deviation, on [−1, 1], that a map shows as white
SHOWN = 4  # images of a batch that a notebook shows


@dataclass(frozen=True)
class Restored:
    """A restoration: the images in the kind of the input, and how far to trust them.

    In a notebook it shows the image before and after, under a slider.

    Attributes:
        image: the restored image, the mean of the samples.
        samples: the draws, each of the kind of ``image``.
        std: standard deviation of the samples at each pixel, on [0, 1], as an array or a tensor;
            None for one sample.
        measurement: the damaged image, as an image of the same size: A⁺y.
        sigma: standard deviation of each image's noise, on [0, 1], as given or estimated.
        residual: ‖y − A x̂‖ over what noise alone leaves, for each image: near 1 where it fits.
        trajectory: x̂₀ on the way, if asked for.
        notes: what does not look right, in sentences.
        names: of the images.
        seed: of the random numbers.
        seconds: sampling time of one image.
    """

    image: Any
    samples: list[Any]
    std: Any
    measurement: Any
    sigma: list[float]
    residual: list[float]
    trajectory: list[Any]
    notes: list[str]
    names: list[str]
    seed: int
    seconds: float
    pixels: dict[str, Tensor] = field(repr=False)

    @classmethod
    def of(
        cls,
        found: Restoration,
        picture: Picture,
        seed: int,
        trajectory: list[Any],
        notes: list[str],
    ) -> Restored:
        """Return what the core gave, in the kind of the input."""
        draws = found["draws"]
        std = None if draws is None else draws.std(1) / 2
        level = torch.as_tensor(found["details"].problem.noise_std).flatten() / 2
        fits = (found["residual"] / found["noise_norm"]).tolist()
        failed = [f"'{name}' was given up: {why}" for name, why in found["failed"].items()]
        told = misfit([] if failed else fits, given=found["truth"] is None)
        notes = [*notes, *failed, *([told] if told else [])]
        pixels = {"before": found["measurement"], "after": found["restored"]}
        if std is not None:
            pixels["std"] = (std.mean(1, keepdim=True) * 4 / WHITE_STD - 1).clamp(-1, 1)
        return cls(
            image=picture.back(found["restored"]),
            samples=[picture.back(found["restored"])]
            if draws is None
            else [picture.back(x) for x in draws.unbind(1)],
            std=None if std is None else picture.numbers(std),
            measurement=picture.back(found["measurement"]),
            sigma=level.expand(len(fits)).tolist(),
            residual=fits,
            trajectory=trajectory,
            notes=notes,
            names=found["id"],
            seed=seed,
            seconds=found["seconds"],
            pixels={name: x.detach().cpu() for name, x in pixels.items()},
        )

    def pil(self, what: str = "after", index: int = 0) -> Image.Image:
        """Return "before", "after" or "std" (black 0, white 0.25 on [0, 1]) as a PIL image."""
        return as_images(self.pixels[what][index : index + 1])[0]

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``<name>.png`` of each image, and ``<name>_std.png`` of several draws.

        Raises:
            InputError: if nobody can write there.
        """
        make_folder(Path(folder).expanduser(), "folder")
        paths = []
        for i, name in enumerate(self.names):
            for what in self.pixels:
                if what != "before":
                    ending = ".png" if what == "after" else "_std.png"
                    paths.append(inside(Path(folder).expanduser(), name, ending))
                    write(paths[-1], png(self.pil(what, i)))
        return paths

    def __repr__(self) -> str:
        """Return a line: how many images of which size, from how many draws."""
        count, (height, width) = len(self.names), self.pixels["after"].shape[-2:]
        draws = f", {len(self.samples)} draws" if len(self.samples) > 1 else ""
        size = f"{height}×{width} pixels{draws}, seed {self.seed}"
        return f"Restored({counted(count, 'image')} of {size})"

    def _repr_png_(self) -> bytes:
        """Return before and after, side by side."""
        images = [self.pil(what) for what in self.pixels]
        width, height = images[0].size
        sheet = Image.new("RGB", (width * len(images) + 4 * (len(images) - 1), height), "white")
        for i, image in enumerate(images):
            sheet.paste(image, (i * (width + 4), 0))
        return png(sheet)

    def _repr_html_(self) -> str:
        """Return before and after under a slider, for the first images."""
        shown = [_slider(self, i) for i in range(min(len(self.names), SHOWN))]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(shown)}</div>{notes}'


def _slider(result: Restored, index: int) -> str:
    """Return one image, before on the left of the slider's place and after on the right."""
    name, width = escape(result.names[index]), max(256, result.pil().width)
    urls = {what: data_url(result.pil(what, index)) for what in result.pixels}
    style = "position:absolute;inset:0;width:100%;image-rendering:auto"
    spread = (
        ""
        if "std" not in urls
        else f'<img src="{urls["std"]}" alt="spread of the draws of \
{name}" style="width:{width // 2}px;display:block"><small>spread of the draws</small>'
    )
    return f"""<figure style="margin:0;--at:50%"><div style="position:relative;width:{width}px">\
<img src="{urls["after"]}" alt="{name}, restored" style="width:100%;display:block">\
<img src="{urls["before"]}" alt="{name}, as it came" style="{style};\
clip-path:inset(0 calc(100% - var(--at)) 0 0)"></div>\
<input type="range" min="0" max="100" value="50" aria-label="before and after" \
style="width:{width}px" oninput="this.parentNode.style.setProperty('--at',this.value+'%')">\
<figcaption><small>{name}: before | after, residual {result.residual[index]:.2f} of the noise's\
</small></figcaption>{spread}</figure>"""
