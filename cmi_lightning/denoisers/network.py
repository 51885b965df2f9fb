"""A pretrained network as a denoiser, with strict loading of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmi_lightning.denoisers.base import Denoiser, Prediction
from cmi_lightning.denoisers.unet import UNet
from cmi_lightning.errors import InputError
from cmi_lightning.schedule import Level, Schedule

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {"fashion-mnist": ASSETS / "fashion_mnist_prior.safetensors"}


class NetworkDenoiser(Denoiser):
    """x̂₀ = (x_t − σ ε_θ(x_t, time)) / α, for a network trained to predict ε, x₀ or v.

    v = α ε − σ x₀ gives x̂₀ = (α x_t − σ v)/(α² + σ²).

    Args:
        network: maps x_t (B, C, H, W) and times (B,) to the prediction (B, C, H, W), or to 2C
            channels of which the second half is the learned variance (the network then says so
            by an attribute ``learn_variance = True``). Two more attributes are read where present:
            ``size_multiple`` and ``derivatives``, see :class:`Denoiser`.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` file, or the name of a shipped prior
            ("fashion-mnist"). None takes the network as it is, for networks you loaded yourself.
        schedule: the levels the network was trained on, or their name: "linear" (the DDPM chain of
            1000), "cosine" or "edm".
        prediction: what the network predicts.
        image_shape: (C, H, W), with None where the network takes any size.
        value_range: range of clean images.

    Raises:
        InputError: if the weights are missing, unreadable or do not fit the network exactly.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | None,
        schedule: Schedule | Literal["linear", "cosine", "edm"] = "linear",
        prediction: Literal["epsilon", "x0", "v"] = "epsilon",
        image_shape: tuple[int | None, int | None, int | None] | None = None,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = Schedule.named(schedule)
        self.prediction = prediction
        self.image_shape = image_shape
        self.value_range = value_range
        self.learns_variance = bool(getattr(network, "learn_variance", False))
        self.derivatives = int(getattr(network, "derivatives", 2))
        self.size_multiple = int(getattr(network, "size_multiple", 1))
        if weights is not None:
            load_weights(network, weights)
        # Frozen parameters need no gradient buffers; gradients with respect to x_t stay available.
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, level: Level) -> Prediction:
        """Return x̂₀ (B, C, H, W) in float32 or wider, and the variance fraction if learned."""
        times = torch.full((x.shape[0],), float(level.time), device=x.device)
        output = self.network(x, times).to(x.dtype)
        fraction = None
        if self.learns_variance:
            output, v = output.chunk(2, dim=1)
            fraction = (v + 1) / 2
        if self.prediction == "epsilon":
            x0 = (x - level.sigma * output) / level.alpha
        elif self.prediction == "v":
            x0 = (level.alpha * x - level.sigma * output) / (level.alpha**2 + level.sigma**2)
        else:
            x0 = output
        return Prediction(x0, fraction)


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


def load_weights(network: nn.Module, source: str | Path) -> None:
    """Load a state dict into ``network``, strictly and without unpickling code.

    Args:
        network: the module to fill.
        source: path of a ``.safetensors``, ``.pt`` or ``.pth`` file, or a shipped prior's name.

    Raises:
        InputError: naming the file and the first tensors that are missing, unexpected or misshapen.
    """
    path = SHIPPED.get(str(source), Path(source).expanduser())
    if not path.is_file():
        raise InputError(
            f"No weights at '{source}': give an existing .safetensors, .pt or .pth file, or one of "
            f"the shipped priors {sorted(SHIPPED)}."
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"Cannot read the weights '{path}' ({type(error).__name__}: {reason}); only plain "
            "tensors are loaded (weights_only=True)."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"'{path}' is not a state dict (a mapping of names to tensors).")
    own = network.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
            for kind, names in problems.items()
            if names
        )
        raise InputError(
            f"The weights '{path}' do not fit the network: {found}; the network's options must be "
            "those the weights were trained with."
        )
    network.load_state_dict(state)
