"""Priors of latents: the chain runs on z, images are x = D(z), and measurements y = A(D(z)) + n."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmi_lightning.denoisers.base import Denoiser, Prediction, Wrapper, size_text
from cmi_lightning.denoisers.conditions import called
from cmi_lightning.denoisers.recompute import Recomputed
from cmi_lightning.denoisers.wrapped import private
from cmi_lightning.errors import InputError, cause
from cmi_lightning.operators.base import Operator
from cmi_lightning.problem import Problem
from cmi_lightning.schedule import Level


class Decoder(nn.Module, ABC):
    """x = D(z), latents (B, c, h, w) to images (B, C, H, W) in [−1, 1], differentiable.

    >>> class Larger(Decoder):  # every latent is two by two pixels
    ...     factor, channels, latent_channels = 2, 1, 1
    ...     def forward(self, z):
    ...         return z.repeat_interleave(2, 2).repeat_interleave(2, 3)
    >>> Larger()(torch.zeros(1, 1, 4, 4)).shape
    torch.Size([1, 1, 8, 8])

    Attributes:
        factor: H/h and W/w.
        channels: C.
        latent_channels: c.
    """

    factor: int
    channels: int
    latent_channels: int

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Return D(z)."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents of images, D(encode(x)) ≈ x, for methods that need them.

        Raises:
            InputError: where a decoder has no encoder.
        """
        raise InputError(f"{type(self).__name__} has no encoder: give it a method encode.")


class Autoencoder(Decoder):
    """D(z) = decode(z/a + b) of a diffusers autoencoder, and encode(x) = (E(x) − b) a.

    a is its ``scaling_factor`` and b its ``shift_factor``. ``AutoencoderKL`` encodes to the mean of
    its posterior; ``VQModel`` rounds to its code book in D, where the derivative is taken as if it
    did not (straight-through). Computed in float32, as half precision overflows in some.

    Args:
        model: the autoencoder, which stays as it is.
        checkpoint: keep no activation of D for derivatives of any order, and compute it again for
            each: memory is that of the latents, and one derivative costs one D more.

    Raises:
        InputError: for a model without decoder or configuration.
    """

    def __init__(self, model: Any, checkpoint: bool = True) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or not hasattr(model, "decode") or config is None:
            raise InputError(
                f"A {called(model)} is no autoencoder: give one of diffusers (AutoencoderKL, "
                "VQModel), or a cmi_lightning.denoisers.Decoder."
            )
        self.checkpoint = checkpoint
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels, self.latent_channels = config.out_channels, config.latent_channels
        self.model: Any = private(model).float().requires_grad_(False).eval()

    def _decode(self, z: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            image: Tensor = self.model.decode(z / self.scale + self.shift, return_dict=False)[0]
        return image

    def forward(self, z: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        own = z.to(parameter.dtype)
        saving = self.checkpoint and torch.is_grad_enabled()
        image = Recomputed.apply(self._decode, own) if saving else self._decode(own)
        return image.to(z.dtype)

    def encode(self, x: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        with sdpa_kernel(SDPBackend.MATH):
            code = self.model.encode(x.to(parameter.dtype), return_dict=False)[0]
        latents = code.mode() if hasattr(code, "mode") and not isinstance(code, Tensor) else code
        return ((latents - self.shift) * self.scale).to(x.dtype)


class Decode(Operator):
    """z ↦ D(z) as a forward model; a guess at its inverse is the encoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.decoder(x)
        return image

    def guess(self, y: Tensor) -> Tensor:
        return self.decoder.encode(y)


class LatentPrior(Wrapper):
    """The prior of x = D(z) where p(z) is a denoiser's: chain and guidance act on z.

    A sampler asks :meth:`state` for the problem as latents see it, with A∘D in place of A, and
    :meth:`image` for the images. Derivatives by z go through D: DPS and DSG descend ‖y − A(D(ẑ₀))‖,
    ΠGDM and CMI take ∂(A∘D)/∂z at ẑ₀.

    Latents have no range, so that nothing is clamped.

    Args:
        denoiser: p(z), a denoiser of latents.
        decoder: D, a :class:`Decoder` or an autoencoder of diffusers.

    Raises:
        InputError: where the latents of both differ.

    Source: Rombach et al. (2022); DPS on latents: Rout et al. (2023), Eq. 6.
    """

    of_latents = True

    def __init__(self, denoiser: Denoiser, decoder: Any) -> None:
        super().__init__(denoiser)
        self.decoder = decoder if isinstance(decoder, Decoder) else Autoencoder(decoder)
        channels, *sides = denoiser.image_shape or (None, None, None)
        factor = self.decoder.factor
        if channels not in (None, self.decoder.latent_channels):
            raise InputError(
                f"The network takes latents of {channels} channels and the decoder has "
                f"{self.decoder.latent_channels}: give the autoencoder that the network was "
                "trained with."
            )
        sides = [None if n is None else n * factor for n in sides]
        self.image_shape = (self.decoder.channels, *sides)
        self.size_multiple = factor * denoiser.size_multiple
        self.value_range, self.latent = None, True

    def forward(self, x: Tensor, level: Level) -> Prediction:
        prediction: Prediction = self.denoiser(x, level)
        return prediction

    def state(self, problem: Problem, like: Tensor) -> tuple[Problem, Tensor]:
        """Return the problem of latents, y = A(D(z)) + n, and zeros like latents of the images."""
        shape = self.inner(tuple(like.shape[1:]))
        decode = Decode(self.decoder)
        decode.image_shape = shape
        lifted = replace(problem, operator=problem.operator @ decode)
        return lifted, like.new_zeros(len(like), *shape)

    def image(self, x: Tensor) -> Tensor:
        """Return D(x) of latents, without graph."""
        with torch.no_grad():
            image: Tensor = self.decoder(x)
        return image

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape (c, h, w) of the latents of images."""
        return (self.decoder.latent_channels, *(n // self.decoder.factor for n in shape[1:]))

    def rehearse(self, shape: tuple[int, ...]) -> None:
        """Rehearse the network and the decoder on the latents of one image."""
        super().rehearse(shape)
        latents = self.inner(shape)
        own = (*self.decoder.parameters(), *self.decoder.buffers(), torch.empty(0))[0]
        try:
            image = self.image(own.new_zeros(1, *latents))
        except Exception as error:
            raise InputError(
                f"The decoder does not take latents of {size_text(latents)} ({cause(error)}): set "
                "data.size."
            ) from error
        if tuple(image.shape[1:]) != tuple(shape):
            raise InputError(
                f"The decoder makes {size_text(tuple(image.shape[1:]))} of latents "
                f"{size_text(latents)}, and {size_text(shape)} is needed: correct its factor."
            )
