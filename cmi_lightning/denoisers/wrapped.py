"""What wrappers of networks share: images in [−1, 1], checks, x̂₀ from what the network predicts."""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cmi_lightning.checked import check, check_value
from cmi_lightning.denoisers.base import Denoiser, Prediction, size_text
from cmi_lightning.denoisers.conditions import Conditions, called
from cmi_lightning.denoisers.weights import load_weights
from cmi_lightning.errors import InputError, cause, warn_once
from cmi_lightning.schedule import Level, Schedule, ScheduleName

Output = Literal["epsilon", "x0", "v", "score", "velocity"]

Time = Literal["time", "index", "sigma", "alpha", "noise_to_signal", "c_noise", "log_snr"]

TIMES: dict[str, Callable[[Level], float]] = {
    "time": lambda level: level.time,
    "index": lambda level: level.time,
    "sigma": lambda level: level.sigma,
    "alpha": lambda level: level.alpha,
    "noise_to_signal": lambda level: level.sigma / level.alpha,
    "c_noise": lambda level: math.log(level.sigma / level.alpha) / 4,
    "log_snr": lambda level: 2 * math.log(level.alpha / level.sigma),
}


class WrappedNetwork(Denoiser):
    """x̂₀ from what a network predicts, in [−1, 1].

    A network that knows images u₀ = c x₀ + m, of another range than x₀ in [−1, 1], sees
    u_t = c x_t + α m = α u₀ + (c σ) ε. So its level (α, σ_u) is our (α, σ_u/c), with the same
    time, and x̂₀ = (û₀ − m)/c, exactly.

    A module that is given stays as it is: what runs is a copy that shares the memory of its
    parameters, frozen and in evaluation mode.

    The arguments are those of :class:`NetworkDenoiser`.
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
        condition: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_value("value_range", value_range, tuple[float, float] | None)
        sides = tuple[int | None, int | None, int | None] | None
        check_value("image_shape", image_shape, sides, "[1, inf)")
        low, high = (-1.0, 1.0) if value_range is None else value_range
        if not low < high:
            raise InputError(f"value_range must be (smallest, largest), got ({low:g}, {high:g}).")
        self.conditions = Conditions(network, condition, unconditional, guidance_scale)
        self.condition, self.unconditional = self.conditions.told, self.conditions.untold
        # As an option of a run it counts only where it does something.
        self.guidance_scale = guidance_scale if self.unconditional else None
        self.own_schedule = Schedule.named(schedule)
        self.gain, self.offset = (high - low) / 2, (high + low) / 2
        self.schedule = self.own_schedule
        if self.gain != 1:
            self.schedule = self.schedule.scale_noise(1 / self.gain)
        self.prediction, self.time = prediction, time
        check(self, "prediction", "time")
        if prediction == "velocity":
            self.own_schedule.refuse_curved()
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
        self.network = private(network) if isinstance(network, nn.Module) else network
        # Frozen parameters need no gradient buffers; gradients with respect to x_t stay available.
        self.requires_grad_(False).eval()

    @abstractmethod
    def _call(self, u: Tensor, level: Level, told: dict[str, Any]) -> Tensor:
        """Return the network's output for u_t (B, C, H, W), both in the network's units.

        ``told`` is what it is told besides, a row an image, by the names of its arguments.
        """

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
        self._check_images(x)
        level = Level(level.alpha, self.gain * level.sigma, level.time)
        plain = self.gain == 1 and self.offset == 0
        u = x if plain else self.gain * x + level.alpha * self.offset
        output = self.conditions(
            lambda u, told: self._checked(u, self._call(u, level, told)),
            u.to(self._dtype(u)),
            x.shape[1],
        ).to(x.dtype)
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
        if self.prediction == "velocity":
            return (u - level.sigma * output) / (level.alpha + level.sigma)
        if self.prediction == "score":
            return (u + level.sigma**2 * output) / level.alpha
        return output

    def rehearse(self, shape: tuple[int, ...]) -> None:
        """Refuse images of ``shape`` (C, H, W) that the spec excludes or the network fails on.

        A large module is tried on PyTorch's "meta" device, without arithmetic. Where it cannot run
        there, and of other networks, one image of zeros is tried.
        """
        self.check(shape)
        own = next(self.parameters(), torch.empty(0))
        level = self.schedule[len(self.schedule) // 2]
        meta = {k: v.to("meta") for k, v in self.state_dict(keep_vars=True).items()}
        work = shape[-1] * shape[-2] * sum(p.numel() for p in self.parameters())
        with torch.no_grad(), contextlib.suppress(Exception):  # else tried in earnest
            if work > 1e11:  # below, a second or so: less than "meta" takes to be imported
                functional_call(self, meta, (torch.zeros(1, *shape, device="meta"), level))
                return
        try:
            with torch.no_grad():
                self(torch.zeros(1, *shape, device=own.device), level)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"The network {called(self.network)} does not take images of {size_text(shape)} "
                f"({cause(error)}): set data.size to the size it was "
                "trained on (or a multiple of its total downsampling), and image_shape to the "
                "sizes that it takes."
            ) from error

    def _check_images(self, x: Tensor) -> None:
        # Sizes are PosteriorSampler's to check: a convolutional network takes others too.
        channels = self.image_shape[0] if self.image_shape else None
        if x.ndim < 2 or channels not in (None, x.shape[1]):
            raise InputError(
                f"The images have shape {tuple(x.shape)} and the network takes (batch, {channels}, "
                "height, width): convert the images, or wrap the denoiser in AsGray or AsRGB."
            )

    def _checked(self, x: Tensor, output: object) -> Tensor:
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
        return output


def compile_networks(denoiser: Denoiser) -> None:
    """Let torch.compile make kernels of a denoiser's networks, at their next call.

    It knows first derivatives, not second ones.

    Raises:
        InputError: if no network of it is a module.
    """
    import torch._functorch.config as functorch  # a switch that has no public name

    networks = [part.network for part in denoiser.modules() if isinstance(part, WrappedNetwork)]
    modules = [network for network in networks if isinstance(network, nn.Module)]
    if not modules:
        raise InputError("model.compile=true needs a network that is a torch.nn.Module.")
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False  # a step takes several products of one graph
    for network in modules:
        if network._compiled_call_impl is None:
            network.compile()


def private(network: nn.Module) -> nn.Module:
    """Return a copy of a module that shares the memory of its tensors, and no switch or flag.

    >>> layer = nn.Linear(1, 1)
    >>> private(layer).requires_grad_(False).double().weight.dtype, layer.weight.requires_grad
    (torch.float64, True)
    """
    memo: dict[int, Any] = {id(b): b.detach() for b in network.buffers()}
    for p in network.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:
        warn_once(
            f"{called(network)} cannot be copied ({cause(error)}): it "
            "is used itself, frozen and in evaluation mode."
        )
        return network
