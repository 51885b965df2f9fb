"""What the page's editor holds, and what is shown of it, as pictures."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from cmi_lightning.data.pictures import as_images
from cmi_lightning.errors import InputError
from cmi_lightning.paths import examples
from cmi_lightning.studio.work import MOST, Choice


def layers(value: Any) -> tuple[Image.Image, Image.Image | None]:
    """Return the photograph of the editor, and what was painted on it, as gray values."""
    background = (value or {}).get("background")
    if background is None:
        raise InputError("There is no photograph: drop one on the page, or choose an example.")
    if background.width * background.height > MOST:
        raise InputError(f"The photograph has more than {MOST // 10**6} million pixels.")
    white = Image.new("RGBA", background.size, "white")
    image = Image.alpha_composite(white, background.convert("RGBA")).convert("RGB")
    painted = [layer.getchannel("A") for layer in value.get("layers") or [] if layer is not None]
    if not painted:
        return image, None
    total = np.max([np.asarray(p.resize(image.size)) for p in painted], axis=0)
    return image, Image.fromarray(total)


def photograph(name: str) -> Image.Image:
    """Return an example photograph."""
    if name not in examples():
        raise gr.Error("There is no such example.")
    return Image.open(examples()[name]).convert("RGB")


def edited(image: Image.Image) -> Any:
    """Return what the editor shows."""
    return {"background": image, "layers": [], "composite": image}


def is_example(value: Any) -> bool:
    """Whether the editor holds an example, which is sound, and no photograph of one's own.

    The editor also tells of pictures that the page puts there, at times a moment late. So every
    example counts, not the chosen one alone.
    """
    background = (value or {}).get("background")
    if background is None:
        return False
    shown = np.asarray(background.convert("RGB"))
    return any(np.array_equal(shown, np.asarray(photograph(name))) for name in examples())


def of_kernel(kind: str, width: float, angle: float) -> Image.Image | None:
    """Return a picture of the blur's kernel, black to white."""
    try:
        values = Choice(damage="blurry", kernel=kind, width=width, angle=angle).kernel_values()
    except (InputError, TypeError):
        return None
    return large(as_images((2 * values / values.max() - 1)[None, None])[0], 160)


def large(image: Image.Image, side: int = 512) -> Image.Image:
    """Return a picture enlarged to about ``side`` pixels, each pixel a square."""
    times = max(1, side // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
