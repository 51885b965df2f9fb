"""A denoiser for images larger than its network: overlapping windows, blended."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from cmi_lightning.checked import check
from cmi_lightning.denoisers.base import Denoiser, Prediction, Wrapper, size_text
from cmi_lightning.denoisers.recompute import Recomputed
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level

MANY = 2**20  # pixels of an image that a network sees in windows


class Tiled(Wrapper):
    """x̂₀ = Σ_k w_k D(x_t in window k), with smooth weights w_k ≥ 0 that sum to 1 at every pixel.

    Windows of one size cover the image at even distances. Across an overlap of o pixels a window's
    weight rises as sin²(π d / 2 o) with the distance d from its border, and all weights are divided
    by their sum. A learned variance is blended in the same way. x̂₀ is as differentiable as D.

    The network sees ``tiles_at_once`` windows in one call. A graph keeps the windows, and no
    activation of a frozen network (:class:`cmi_lightning.denoisers.recompute.Recomputed`): memory
    grows with the window and not with the image, and each derivative costs another forward pass.

    Exact for priors whose pixels are independent, and near it where dependence ends within the
    overlap. A window knows nothing of the rest of the image.

    Args:
        denoiser: the prior of a window.
        size: side of a window, in pixels; None takes the (H, W) that the denoiser has.
        overlap: pixels that neighbouring windows share at least; None for a quarter of a window.
        tiles_at_once: windows in one network call.

    Raises:
        InputError: for a size that the denoiser does not take, or an overlap outside [0, size).

    >>> from cmi_lightning.denoisers import shipped_prior
    >>> prior = Tiled(shipped_prior("fashion-mnist"), overlap=8)
    >>> prior(torch.zeros(1, 1, 50, 77), prior.schedule[500]).x0.shape
    torch.Size([1, 1, 50, 77])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        size: int | None = None,
        overlap: int | None = None,
        tiles_at_once: int = 8,
    ) -> None:
        super().__init__(denoiser)
        self.size, self.tiles_at_once = size, tiles_at_once
        check(self, tiles_at_once="[1, inf)", size="[1, inf)")
        channels, *sides = denoiser.image_shape or (None, None, None)
        window = [side if size is None else size for side in sides]
        if size is None and None in window:
            raise InputError("The network has no size of its own: set the size of the windows.")
        self.window: tuple[int, ...] = tuple(window)  # type: ignore[arg-type]
        for side, own in zip(self.window, sides, strict=True):
            if own not in (None, side) or side < 1 or side % denoiser.size_multiple:
                raise InputError(
                    f"Windows of {size_text(self.window)} pixels do not suit the network: it takes "
                    f"{size_text(tuple(sides))}, in multiples of {denoiser.size_multiple}."
                )
        self.overlap: int = min(self.window) // 4 if overlap is None else overlap
        check(self, overlap=f"[0, {min(self.window)})")
        self.image_shape = (channels, None, None)
        self.size_multiple, self.trained_side = 1, None

    def forward(self, x: Tensor, level: Level) -> Prediction:
        if self.inner(tuple(x.shape[1:])) == x.shape[1:]:
            return self.denoiser(x, level)
        places = _places(self.window, self.overlap, tuple(x.shape[-2:]), x.device, x.dtype)
        windows = torch.stack([x[..., rows, columns] for rows, columns, _ in places], dim=1)
        parts = [
            self._run(tiles, level) for tiles in windows.flatten(0, 1).split(self.tiles_at_once)
        ]

        def blended(tiles: Tensor) -> Tensor:
            tiles = tiles.unflatten(0, windows.shape[:2])
            image = tiles.new_zeros(*tiles.shape[:1], *tiles.shape[2:-2], *x.shape[-2:])
            for k, (rows, columns, weight) in enumerate(places):
                image[..., rows, columns] += tiles[:, k] * weight
            return image

        x0, fractions = zip(*parts, strict=True)
        prediction = Prediction(torch.cat(x0))
        if fractions[0] is not None:
            prediction = Prediction(prediction.x0, torch.cat(fractions))
        return prediction.map(blended)

    def _run(self, tiles: Tensor, level: Level) -> Prediction:
        """Return the prediction of windows (n, C, h, w), without a graph of what is in between."""
        if any(p.requires_grad for p in self.denoiser.parameters()):
            return self.denoiser(tiles, level)
        device = tiles.device.type
        low, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def predict(tiles: Tensor) -> Tensor | tuple[Tensor, ...]:
            with torch.autocast(device, dtype, enabled=low):  # recomputed as it was computed
                x0, fraction = self.denoiser(tiles, level)
            return x0 if fraction is None else (x0, fraction)

        found = Recomputed.apply(predict, tiles)
        return Prediction(found) if isinstance(found, Tensor) else Prediction(*found)

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sides = zip(shape[1:], self.window, strict=True)
        return (shape[0], *(min(n, side) for n, side in sides))


@lru_cache(16)
def _places(
    window: tuple[int, ...],
    overlap: int,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[slice, slice, Tensor]]:
    """Return rows, columns and weights (h, w) of each window of an image (H, W), once for each."""
    with torch.inference_mode(False):
        rows, columns = (_axis(n, min(n, m), overlap) for n, m in zip(shape, window, strict=True))
        return [
            (
                slice(top, top + len(down)),
                slice(left, left + len(across)),
                (down[:, None] * across).to(device, dtype),
            )
            for top, down in rows
            for left, across in columns
        ]


def _axis(n: int, side: int, overlap: int) -> list[tuple[int, Tensor]]:
    """Return first pixel and weights (side,) of each window along an axis of n pixels."""
    count = 1 if n == side else math.ceil((n - overlap) / (side - overlap))
    starts = [round(k * (n - side) / max(count - 1, 1)) for k in range(count)]
    near = torch.arange(side, dtype=torch.float64) + 0.5
    ramp = (torch.minimum(near, side - near) / max(overlap, 1)).clamp(max=1)
    bump, total = torch.sin(ramp * math.pi / 2) ** 2, torch.zeros(n, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += bump
    return [(start, bump / total[start : start + side]) for start in starts]


def suited(denoiser: Denoiser, shape: tuple[int, ...]) -> Denoiser:
    """Return the denoiser, tiled where images (C, H, W) ask for it.

    That is: a network of one size gets larger images; or one of any size gets images more than
    twice as wide or high as those it was trained on (docs/photos.md has what that gains), sides
    that are not its multiples, or more than a million pixels, whose activations fill the memory.

    >>> from cmi_lightning.denoisers import shipped_prior
    >>> suited(shipped_prior(), (3, 64, 100)).window
    (64, 64)
    >>> sizes = (64, 128), (64, 136), (8, 200)
    >>> [isinstance(suited(shipped_prior(), (3, *size)), Tiled) for size in sizes]
    [False, True, False]
    """
    wanted, multiple = denoiser.image_shape, denoiser.size_multiple
    if wanted is None or wanted[0] not in (None, shape[0]):
        return denoiser
    sides = [side for side in wanted[1:] if side is not None]
    if len(sides) == 2:
        larger = all(n >= side for side, n in zip(sides, shape[1:], strict=True))
        return Tiled(denoiser) if larger and wanted[1:] != shape[1:] else denoiser
    if isinstance(denoiser, Tiled) or sides or min(shape[1:]) < multiple:
        return denoiser
    own, many = denoiser.trained_side, shape[1] * shape[2] > MANY
    wide = own is not None and min(shape[1:]) >= own and max(shape[1:]) > 2 * own
    if not wide and not many and not any(n % multiple for n in shape[1:]):
        return denoiser
    side = own or (256 if many else 64)
    return Tiled(denoiser, min(side, *shape[1:]) // multiple * multiple)
