"""A pretrained network as a denoiser: its prediction, its notion of time, and its image range."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from cmi_lightning.denoisers.base import Denoiser, Prediction, size_text
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import SHIPPED, find_weights, hub_folder, load_weights
from cmi_lightning.errors import InputError, first_line
from cmi_lightning.files import write, write_json
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

    The arguments are those of :class:`NetworkDenoiser`.
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
        self.network, self.own_schedule = network, Schedule.named(schedule)
        self._refuse_conditional(network)
        self.gain, self.offset = (high - low) / 2, (high + low) / 2
        self.schedule = self.own_schedule
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

    @staticmethod
    def _refuse_conditional(network: nn.Module | Callable) -> None:
        """Refuse a network that must be told more than x_t and its time."""
        try:
            call = network.forward if isinstance(network, nn.Module) else network
            parameters = list(inspect.signature(call).parameters.values())
        except (TypeError, ValueError):  # built-in functions have no signature
            return
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        more = [
            p.name
            for i, p in enumerate(parameters)
            if p.default is p.empty
            and (p.kind is p.KEYWORD_ONLY or (p.kind in positional and i >= 2))
        ]
        if more:
            raise InputError(
                f"The network {_called(network)} needs {', '.join(more)} besides x_t and its time "
                "(a class or another condition): wrap it in a module that supplies the value, or "
                "use an unconditional network."
            )

    def rehearse(self, shape: tuple[int, ...]) -> None:
        """Refuse images of ``shape`` (C, H, W) that the spec excludes or the network fails on.

        A large module is tried on PyTorch's "meta" device, without arithmetic. Where it cannot run
        there, and of other networks, one image of zeros is tried.
        """
        self.check(shape)
        network = self.network
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
            classes = next((n for n in _CLASSES if getattr(network, n, None) is not None), None)
            raise InputError(
                f"The network {_called(network)} does not take images of {size_text(shape)} "
                f"({type(error).__name__}: {first_line(error)}): "
                + (
                    f"it has {classes}, so wrap it in a module that supplies the class."
                    if classes
                    else "set data.size to the size it was trained on (or a multiple of its total "
                    "downsampling), and image_shape to the sizes that it takes."
                )
            ) from error

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


_CLASSES = ("num_classes", "label_dim", "num_class_embeds", "class_embed_type")


def _called(network: Any) -> str:
    return getattr(network, "__name__", type(network).__name__)


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
            of a shipped prior, see :func:`load_weights`. None takes the network as it is.
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
        InputError: if the weights are missing, unreadable or do not fit the network exactly, or the
            network needs a class; and, when it is called, if the images have other channels than
            declared, or the output another shape than the images.

    >>> prior = NetworkDenoiser(lambda x, times: x, None, image_shape=(3, None, None))
    >>> level = prior.schedule[500]
    >>> prior(torch.ones(1, 3, 8, 8), level).x0.shape  # (1 − σ) / α everywhere
    torch.Size([1, 3, 8, 8])
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

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``model.safetensors`` and ``config.json``, for :meth:`from_pretrained`.

        Args:
            folder: where, made if absent.
            dtype: precision on disk, such as ``torch.float16``; None keeps the network's.

        Raises:
            InputError: for a network without ``config``, its constructor's arguments.
        """
        config = getattr(self.network, "config", None)
        if not isinstance(config, dict) or not isinstance(self.network, nn.Module):
            raise InputError(
                f"The network {_called(self.network)} has no dictionary 'config' of its "
                "constructor's arguments, without which it cannot be made again: set one."
            )
        names = [n for n in get_args(ScheduleName) if Schedule.named(n) == self.own_schedule]
        spec = {
            "network": config,
            "schedule": names[0] if names else asdict(self.own_schedule),
            "prediction": self.prediction,
            "image_shape": self.image_shape,
            "value_range": self.value_range and (self.offset - self.gain, self.offset + self.gain),
            "time": self.time,
            "learns_variance": self.learns_variance,
        }
        state = {
            k: v.detach().cpu().to(dtype if v.is_floating_point() else None).contiguous()
            for k, v in self.network.state_dict().items()
        }
        write(Path(folder) / "model.safetensors", save(state))
        write_json(Path(folder) / "config.json", spec)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, network: nn.Module | None = None
    ) -> NetworkDenoiser:
        """Return what :meth:`save_pretrained` wrote, in float32.

        Args:
            folder: the folder, or "hf://owner/name" on the Hugging Face hub.
            network: the network to fill, for another class than :class:`UNet`: a file from
                elsewhere does not choose what code runs.

        Raises:
            InputError: for a folder without either file, or weights that do not fit.

        >>> import tempfile
        >>> prior = NetworkDenoiser(UNet(1, 32, (1,), attention_levels=()), None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     prior.save_pretrained(folder, torch.float16)
        ...     NetworkDenoiser.from_pretrained(folder).network.config["in_channels"]
        1
        """
        home = hub_folder(str(folder))
        try:
            spec = json.loads((home / "config.json").read_text(encoding="utf-8"))
            made = UNet(**spec.pop("network")) if network is None else network
            spec.pop("network", None)
            if isinstance(spec["schedule"], dict):
                spec["schedule"] = Schedule(**{k: tuple(v) for k, v in spec["schedule"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"'{home}' has no config.json that NetworkDenoiser.save_pretrained wrote for a "
                f"UNet ({type(error).__name__}: {first_line(error)})."
            ) from error
        return cls(made, str(home / "model.safetensors"), **spec)


_SHIPPED_NETWORKS: dict[str, tuple[dict[str, Any], Output, tuple[int, int | None, int | None]]] = {
    "fashion-mnist": (
        {"in_channels": 1, "channel_mult": (1, 2, 2, 2), "attention_levels": (2,)},
        "epsilon",
        (1, 32, 32),
    ),
    "photos-64": (
        {
            "patch_size": 2,
            "channel_mult": (1, 2, 4),
            "attention_levels": (),
            "middle_attention": False,
        },
        "v",
        (3, None, None),
    ),
}


def shipped_prior(
    name: Literal["fashion-mnist", "photos-64"] = "photos-64",
) -> NetworkDenoiser:
    """Return a prior that ships with the package.

    Args:
        name: "photos-64" (colour photographs, trained on 64×64; sides that are multiples of 8), or
            "fashion-mnist" (gray garments, 32×32).

    Raises:
        InputError: for another name.

    >>> shipped_prior("fashion-mnist").image_shape
    (1, 32, 32)
    """
    if name not in _SHIPPED_NETWORKS:
        raise InputError(f"There is no shipped prior '{name}': use {', '.join(SHIPPED)}.")
    find_weights(name)  # before the network is made
    options, prediction, image_shape = _SHIPPED_NETWORKS[name]
    network = UNet(model_channels=32, num_res_blocks=1, **options)
    return NetworkDenoiser(network, name, prediction=prediction, image_shape=image_shape)
