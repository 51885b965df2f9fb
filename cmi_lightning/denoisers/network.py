"""A pretrained network as a denoiser: its prediction, its notion of time, and its image range."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cmi_lightning.denoisers.conditions import called
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.denoisers.weights import hub_folder, save_weights
from cmi_lightning.denoisers.wrapped import TIMES, WrappedNetwork
from cmi_lightning.errors import InputError, cause
from cmi_lightning.files import read_json, write_json
from cmi_lightning.schedule import Level, Schedule, ScheduleName


class NetworkDenoiser(WrappedNetwork):
    """x̂₀ = (x_t − σ ε_θ(x_t, time)) / α, for networks that predict ε, x₀, v, velocity or score.

    v = α ε − σ x₀ gives x̂₀ = (α x_t − σ v)/(α² + σ²), the score s = −ε/σ of p(x_t) gives
    x̂₀ = (x_t + σ² s)/α, and the velocity u = ε − x₀ of a straight path, α + σ = 1, gives
    x̂₀ = x_t − σ u. (For networks of x₀ − ε, give a function that changes the sign.)

    Args:
        network: maps x_t (B, C, H, W) and times (B,) to the prediction (B, C, H, W), or to 2C
            channels of which the second half is the learned variance. A module or any callable.
            Three attributes are read where present: ``learn_variance``, and ``size_multiple`` and
            ``derivatives`` (see :class:`Denoiser`).
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` file, a folder with one, a URL, or the name
            of a shipped prior, see :func:`load_weights`. None takes the network as it is.
        schedule: the levels the network was trained on, or their name: "linear" (the DDPM chain of
            1000), "cosine", "edm", "vp" (continuous) or "rectified" (flow matching).
        prediction: what the network predicts.
        image_shape: (C, H, W), with None where the network takes any size.
        value_range: range of clean images as the network was trained on them, (0, 1) for example;
            outside the network images are always [−1, 1], see :class:`WrappedNetwork`. None for
            unbounded images, taken as they are.
        time: what the network is told about the level: its "time" in the schedule, the same as an
            integer ("index"), "sigma" (σ), "alpha" (α), "noise_to_signal" (σ/α), "c_noise"
            (ln(σ/α)/4) or "log_snr" (ln α²/σ²).
        learns_variance: the network's output has 2C channels; None asks the network's attribute.
        sha256: checksum of the weights file.
        weights_part: which part of a checkpoint that holds the network twice, such as "ema".
        condition: what the network is told besides, such as {y: 207}; see
            :class:`cmi_lightning.denoisers.conditions.Conditions`.
        unconditional: what it is told for "nothing", for classifier-free guidance.
        guidance_scale: weight of the condition; 1 is the network as it is.

    Raises:
        InputError: if the weights are missing, unreadable or do not fit the network exactly, or the
            network is not told what it needs; and, when it is called, if the images have other
            channels than declared, or the output another shape than the images.

    >>> prior = NetworkDenoiser(lambda x, times: x, None, image_shape=(3, None, None))
    >>> level = prior.schedule[500]
    >>> prior(torch.ones(1, 3, 8, 8), level).x0.shape  # (1 − σ) / α everywhere
    torch.Size([1, 3, 8, 8])
    """

    def _call(self, u: Tensor, level: Level, told: dict[str, Any]) -> Tensor:
        times = self._fill(u, TIMES[self.time](level))
        if self.time == "index":
            times = times.round().long()
        output: Tensor = self.network(u, times, **told)
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
                f"The network {called(self.network)} has no dictionary 'config' of its "
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
        save_weights(self.network, Path(folder) / "model.safetensors", dtype)
        write_json(Path(folder) / "config.json", spec)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, network: nn.Module | None = None, **conditions: Any
    ) -> NetworkDenoiser:
        """Return what :meth:`save_pretrained` wrote, in float32.

        Args:
            folder: the folder, or "hf://owner/name" on the Hugging Face hub.
            network: the network to fill, for another class than :class:`UNet`: a file from
                elsewhere does not choose what code runs.
            conditions: ``condition``, ``unconditional`` and ``guidance_scale``, which are not kept.

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
            spec = read_json(home / "config.json")
            made = UNet(**spec.pop("network")) if network is None else network
            spec.pop("network", None)
            if isinstance(spec["schedule"], dict):
                spec["schedule"] = Schedule(**{k: tuple(v) for k, v in spec["schedule"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"'{home}' has no config.json that NetworkDenoiser.save_pretrained wrote for a "
                f"UNet ({cause(error)})."
            ) from error
        return cls(made, str(home / "model.safetensors"), **spec, **conditions)
