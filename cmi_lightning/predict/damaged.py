"""The problem of a damaged image, and the prior for its channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmi_lightning.data.extras import looks_inverted
from cmi_lightning.data.noise_levels import estimate_sigma
from cmi_lightning.denoisers import AsGray, AsRGB, Denoiser
from cmi_lightning.errors import InputError
from cmi_lightning.noise import SampleNoise
from cmi_lightning.operators import Inpaint, Operator, PixelMask
from cmi_lightning.problem import Problem

ESTIMATE = "estimate"  # the sigma that is found by wavelets


def problem_of(
    x: Tensor, operator: Operator, sigma: float | str, noise: SampleNoise, simulate: bool
) -> tuple[Problem, Tensor, list[str]]:
    """Return the problem of damaged images x (B, C, h, w), images like those sought, and notes."""
    masked = isinstance(operator, (Inpaint, PixelMask))
    known = known_pixels(x, operator, noise) if masked else None
    std = _std(x, sigma, known)
    if simulate:
        return Problem.simulate(x, operator, std, noise), x, []
    pairs = [] if known is None else zip(noise.ids, x.cpu(), known, strict=True)
    notes = [
        f"The known pixels of '{name}' are of one colour and the missing ones differ: is its mask "
        "inverted? White is known, black is missing."
        for name, y, of_image in pairs
        if looks_inverted(y, of_image)
    ]
    factor = getattr(operator, "factor", 1)
    like = x.new_zeros(*x.shape[:2], x.shape[2] * factor, x.shape[3] * factor)
    bound = Problem(x, operator, std).bind(noise, like).operator
    with torch.no_grad():
        seen = bound(like)
    if seen.shape != x.shape:  # it picks pixels of the image
        if like.shape != x.shape:
            raise InputError(
                f"{type(operator).__name__} makes measurements {tuple(seen.shape[1:])}, and the "
                f"image is {tuple(x.shape[1:])}."
            )
        x = bound(x)
    return Problem(x, bound, std), like, notes


def known_pixels(x: Tensor, operator: Operator, noise: SampleNoise) -> Tensor:
    """Return the pixels (B, H, W) that a mask leaves of images x, in their first channel."""
    bound: Any = operator.bind(tuple(x.shape[1:]), noise, x)
    return bound.pinv(bound(torch.ones_like(x)))[:, 0].cpu() > 0.5


def _std(x: Tensor, sigma: float | str, known: Tensor | None) -> float | Tensor:
    """Return the noise level on [−1, 1]: one number, or one for each image."""
    if sigma == ESTIMATE:
        try:
            found = [
                estimate_sigma(y, None if known is None else known[i])
                for i, y in enumerate(x.cpu())
            ]
        except ValueError as error:
            raise InputError(f"The noise cannot be estimated ({error}): give sigma.") from error
        return found[0] if len(found) == 1 else torch.tensor(found).to(x)
    if isinstance(sigma, str) or not 0 <= sigma < float("inf"):
        raise InputError(f"sigma must be at least 0, or '{ESTIMATE}'; got {sigma!r}.")
    return 2.0 * sigma


def given_channels(prior: Denoiser) -> int | None:
    """Return what files are converted to: gray and colour both work, transparency does not."""
    channels = (prior.image_shape or (None,))[0]
    return channels if channels not in (1, 3) else None


def for_channels(prior: Denoiser, channels: int) -> Denoiser:
    """Return a prior for gray or colour images."""
    own = (prior.image_shape or (None,))[0]
    if own == 3 and channels == 1:
        return AsGray(prior)
    return AsRGB(prior, channels) if own == 1 and channels > 1 else prior
