"""A pretrained network as a denoiser: what it predicts, what it is told, and its image range."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cmi_lightning.denoisers.base import Denoiser, Prediction
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import SHIPPED, load_weights
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level, Schedule

__all__ = ["SHIPPED", "NetworkDenoiser", "WrappedNetwork", "load_weights", "shipped_prior"]

Output = Literal["epsilon", "x0", "v", "score"]
Time = Literal["time", "index", "sigma", "noise_to_signal", "c_noise", "log_snr"]
ScheduleName = Literal["linear", "cosine", "edm", "vp"]

TIMES: dict[str, Callable[[Level], float]] = {
    "time": lambda level: level.time,
    "index": lambda level: level.time,
    "sigma": lambda level: level.sigma,
    "noise_to_signal": lambda level: level.sigma / level.alpha,
    "c_noise": lambda level: math.log(level.sigma / level.alpha) / 4,
    "log_snr": lambda level: 2 * math.log(level.alpha / level.sigma),
}


class WrappedNetwork(Denoiser):
    """What wrappers of networks share: x̂₀ from what the network predicts, in [−1, 1].

    A network that knows images u₀ = c x₀ + m, of another range than x₀ in [−1, 1], sees
    u_t = c x_t + α m = α u₀ + (c σ) ε. So its level (α, σ_u) is our (α, σ_u/c), with the same
    time, and x̂₀ = (û₀ − m)/c, exactly.

    Args:
        network: see :class:`NetworkDenoiser`, as are the others.
        weights: see there.
        schedule: see there.
        prediction: see there.
        image_shape: see there.
        value_range: see there.
        learns_variance: see there.
        sha256: see there.
        weights_part: see there.
    """

    def __init__(
        self,
        network: nn.Module | Callable,
        weights: str | None,
        schedule: Schedule | ScheduleName,
        prediction: Output,
        image_shape: tuple[int | None, int | None, int | None] | None,
        value_range: tuple[float, float] | None,
        learns_variance: bool | None,
        sha256: str | None = None,
        weights_part: str | None = None,
    ) -> None:
        super().__init__()
        low, high = value_range or (-1.0, 1.0)
        if not low < high:
            raise InputError(f"value_range must be (smallest, largest), got ({low:g}, {high:g}).")
        self.network = network
        self.gain, self.offset = (high - low) / 2, (high + low) / 2
        self.schedule = Schedule.named(schedule)
        if self.gain != 1:
            self.schedule = self.schedule.scale_noise(1 / self.gain)
        self.prediction = prediction
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.value_range = None if value_range is None else (-1.0, 1.0)
        if learns_variance is None:
            learns_variance = bool(getattr(network, "learn_variance", False))
        self.learns_variance = learns_variance
        self.derivatives = int(getattr(network, "derivatives", 2))
        self.size_multiple = int(getattr(network, "size_multiple", 1))
        if weights is not None:
            if not isinstance(network, nn.Module):
                raise InputError(
                    f"Weights '{weights}' are given for a network that is no torch.nn.Module; let "
                    "it load them itself, and set weights to null."
                )
            load_weights(network, weights, sha256, weights_part)
        elif sha256 is not None or weights_part is not None:
            raise InputError("sha256 and weights_part describe a file: set weights, or drop them.")
        # Frozen parameters need no gradient buffers; gradients with respect to x_t stay available.
        self.requires_grad_(False).eval()

    @abstractmethod
    def _call(self, u: Tensor, level: Level) -> Tensor:
        """Return the network's output for u_t (B, C, H, W), both in the network's units."""

    def _dtype(self, u: Tensor) -> torch.dtype:
        """The precision the network computes in: its parameters', or that of u_t if it has none."""
        for tensor in self.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.promote_types(u.dtype, torch.float32)

    def _fill(self, u: Tensor, value: float) -> Tensor:
        """Return ``value`` for every image, (B,), as networks receive their time."""
        dtype = torch.promote_types(self._dtype(u), torch.float32)
        return torch.full((len(u),), float(value), device=u.device, dtype=dtype)

    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return x̂₀ (B, C, H, W) in the dtype of x_t, and the variance fraction if learned.

        Raises:
            InputError: for images of other channels than declared, or an output of the wrong shape.
        """
        self._check_images(x)
        level = Level(level.alpha, self.gain * level.sigma, level.time)
        plain = self.gain == 1 and self.offset == 0
        u = x if plain else self.gain * x + level.alpha * self.offset
        output = self._call(u.to(self._dtype(u)), level)
        self._check_output(x, output)
        output = output.to(x.dtype)
        fraction = None
        if self.learns_variance:
            output, v = output.chunk(2, dim=1)
            fraction = (v + 1) / 2
        u0 = self._denoised(u, output, level)
        return Prediction(u0 if plain else (u0 - self.offset) / self.gain, fraction)

    def _denoised(self, u: Tensor, output: Tensor, level: Level) -> Tensor:
        if self.prediction == "epsilon":
            return (u - level.sigma * output) / level.alpha
        if self.prediction == "v":
            return (level.alpha * u - level.sigma * output) / (level.alpha**2 + level.sigma**2)
        if self.prediction == "score":
            return (u + level.sigma**2 * output) / level.alpha
        return output

    def _check_images(self, x: Tensor) -> None:
        # Sizes are PosteriorSampler's to check: a convolutional network takes others too.
        channels = self.image_shape[0] if self.image_shape else None
        if x.ndim < 2 or channels not in (None, x.shape[1]):
            raise InputError(
                f"The images have shape {tuple(x.shape)} and the network takes (batch, {channels}, "
                "height, width): convert the images, or wrap the denoiser in AsGray or AsRGB."
            )

    def _check_output(self, x: Tensor, output: object) -> None:
        if not isinstance(output, Tensor):
            raise InputError(
                f"The network returned {type(output).__name__} and must return a tensor: wrap it "
                "in a function that takes out the prediction."
            )
        channels = x.shape[1] * (2 if self.learns_variance else 1)
        wanted = (len(x), channels, *x.shape[2:])
        if tuple(output.shape) != wanted:
            remedy = "image_shape and the network's channels must agree"
            if output.shape[1:2] == (2 * channels,):
                remedy = "if the second half is a learned variance, set learns_variance to true"
            elif 2 * output.shape[1] == channels:
                remedy = "it has no learned variance, so set learns_variance to false"
            raise InputError(
                f"The network returned {tuple(output.shape)} for images {tuple(x.shape)}, where "
                f"{wanted} is needed: {remedy}."
            )
        if torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
            raise InputError(
                "The network's output carries no gradient of x_t, which guidance needs: take "
                "no_grad, inference_mode and detach out of its forward."
            )


class NetworkDenoiser(WrappedNetwork):
    """x̂₀ = (x_t − σ ε_θ(x_t, time)) / α, for any network that predicts ε, x₀, v or the score.

    v = α ε − σ x₀ gives x̂₀ = (α x_t − σ v)/(α² + σ²), and the score s = −ε/σ of p(x_t) gives
    x̂₀ = (x_t + σ² s)/α.

    Args:
        network: maps x_t (B, C, H, W) and times (B,) to the prediction (B, C, H, W), or to 2C
            channels of which the second half is the learned variance. A module or any callable.
            Three attributes are read where present: ``learn_variance``, and ``size_multiple`` and
            ``derivatives`` (see :class:`Denoiser`).
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` file, a folder with one, a URL, or the name
            of a shipped prior ("fashion-mnist"), see :func:`load_weights`. None takes the network
            as it is, for networks that load their own.
        schedule: the levels the network was trained on, or their name: "linear" (the DDPM chain of
            1000), "cosine", "edm" or "vp" (continuous).
        prediction: what the network predicts.
        image_shape: (C, H, W), with None where the network takes any size.
        value_range: range of clean images as the network was trained on them, (0, 1) for example;
            outside the network images are always [−1, 1], see :class:`WrappedNetwork`. None for
            unbounded images, taken as they are.
        time: what the network is told about the level: its "time" in the schedule, the same as an
            integer ("index"), "sigma" (σ), "noise_to_signal" (σ/α), "c_noise" (ln(σ/α)/4) or
            "log_snr" (ln α²/σ²).
        learns_variance: the network's output has 2C channels; None asks the network's attribute.
        sha256: checksum of the weights file.
        weights_part: which part of a checkpoint that holds the network twice, such as "ema".

    Raises:
        InputError: if the weights are missing, unreadable or do not fit the network exactly; and,
            when it is called, if the images have other channels than declared, or the output
            another shape than the images.
    """

    def __init__(
        self,
        network: nn.Module | Callable,
        weights: str | None,
        schedule: Schedule | ScheduleName = "linear",
        prediction: Output = "epsilon",
        image_shape: tuple[int | None, int | None, int | None] | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        time: Time = "time",
        learns_variance: bool | None = None,
        sha256: str | None = None,
        weights_part: str | None = None,
    ) -> None:
        super().__init__(
            network,
            weights,
            schedule,
            prediction,
            image_shape,
            value_range,
            learns_variance,
            sha256,
            weights_part,
        )
        if time not in TIMES:
            raise InputError(f"time must be one of {', '.join(TIMES)}, got '{time}'.")
        self.time = time

    def _call(self, u: Tensor, level: Level) -> Tensor:
        times = self._fill(u, TIMES[self.time](level))
        output: Tensor = self.network(u, times.round().long() if self.time == "index" else times)
        return output


def shipped_prior() -> NetworkDenoiser:
    """Return the Fashion-MNIST prior that ships with the package: 1 channel, 32x32."""
    network = UNet(
        in_channels=1,
        model_channels=32,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=1,
        attention_levels=(2,),
    )
    return NetworkDenoiser(network, "fashion-mnist", image_shape=(1, 32, 32))
