"""What a network is told besides x_t and its time, and guidance without a classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmi_lightning.checked import as_python, check_value
from cmi_lightning.denoisers.checkpoints import read_checkpoint
from cmi_lightning.errors import InputError, cause

# Attributes and entries of `config` that say that a network must be told more, and its argument.
WANTED = {
    "num_classes": "y",
    "label_dim": "class_labels",
    "num_class_embeds": "class_labels",
    "class_embed_type": "class_labels",
    "num_embeds_ada_norm": "class_labels",
    "encoder_hid_dim": "encoder_hidden_states",
    "joint_attention_dim": "encoder_hidden_states",
    "pooled_projection_dim": "pooled_projections",
    "addition_embed_type": "added_cond_kwargs",
}


class Conditions:
    """Calls a network with its condition: o = f(x_t, t; c), or o = f(∅) + w (f(c) − f(∅)).

    Both terms of the second, classifier-free guidance, come from one call on twice the batch. A
    learned variance is that of f(c). As x̂₀ is affine in the output, x̂₀ is guided alike.

    Args:
        network: f, for its name and what it must be told.
        condition: c, by the names of the network's arguments, for all images alike: an integer (a
            class), a list or a tensor without batch dimension, or the path of a file that holds
            one tensor.
        unconditional: ∅, of the same names, such as an empty text's embedding.
        guidance_scale: w; 1 is f(c) alone.

    Raises:
        InputError: for a network that is not told what it needs, or told what it does not take.

    Source: Ho & Salimans (2022), Eq. 6, with w their 1 + w.
    """

    def __init__(
        self,
        network: nn.Module | Callable,
        condition: Mapping[str, Any] | None,
        unconditional: Mapping[str, Any] | None,
        guidance_scale: float,
    ) -> None:
        self.told = {k: _tensor(k, v) for k, v in (condition or {}).items()}
        self.untold = {k: _tensor(k, v) for k, v in (unconditional or {}).items()}
        check_value("guidance_scale", guidance_scale, float)
        self.scale = float(guidance_scale)
        self._refuse_untold(network)
        with_, without = (_each(_shape, c) for c in (self.told, self.untold))
        if (self.scale != 1 or self.untold) and with_ != without:
            raise InputError(
                f"guidance_scale={self.scale:g} compares the network with and without its "
                "condition: give condition and unconditional, of the same names and shapes."
            )

    def _refuse_untold(self, network: nn.Module | Callable) -> None:
        name = called(network)
        parameters = _parameters(network)
        if parameters is not None:
            required = [
                n
                for n, p in parameters.items()
                if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in self.told
            ]
            if required:
                raise InputError(
                    f"The network {name} needs {', '.join(required)} besides x_t and its time (a "
                    f"class or another condition): give it by condition, {{{required[0]}: …}}."
                )
        for attribute, argument in WANTED.items():
            value = _said(network, attribute)
            if not value:
                continue
            own = parameters is not None and argument in parameters
            if argument not in self.told if own else not self.told:
                raise InputError(
                    f"The network {name} has {attribute}={value}, so that it must be told "
                    f"{argument}: give it by condition, {{{argument}: …}}."
                )
            told = self.told.get(argument)
            if attribute in ("num_classes", "label_dim", "num_class_embeds") and (
                isinstance(told, int) and not 0 <= told < value
            ):
                raise InputError(
                    f"condition says {argument}={told}, and the classes of the network {name} are "
                    f"0 to {value - 1}."
                )
        if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        if surplus := [n for n in self.told if n not in parameters]:
            takes = ", ".join(parameters) or "none"
            raise InputError(
                f"condition has {', '.join(surplus)}, and the network {name} takes {takes} besides "
                "x_t and its time."
            )

    def __call__(
        self, call: Callable[[Tensor, dict[str, Any]], Tensor], u: Tensor, channels: int
    ) -> Tensor:
        """Return the output for u_t (B, C, *), guided in its first ``channels`` channels.

        The others hold the variance. ``call`` gives the output for images and conditions, by rows.
        """
        self.told, self.untold = on(self.told, u), on(self.untold, u)
        told = rows(self.told, u)
        if self.scale == 1:
            return call(u, told)
        both = _each(lambda a, b: torch.cat([a, b.to(a.dtype)]), told, rows(self.untold, u))
        with_, without = call(torch.cat([u, u]), both).chunk(2)
        guided = without + self.scale * (with_ - without)
        return torch.cat([guided[:, :channels], with_[:, channels:]], dim=1)


def on(condition: Mapping[str, Any], u: Tensor) -> dict[str, Any]:
    """Return a condition with its tensors on the device of u: there from the first call on."""
    return _each(lambda v: v.to(u.device) if isinstance(v, Tensor) else v, condition)


def rows(condition: Mapping[str, Any], u: Tensor) -> dict[str, Any]:
    """Return a condition for every image of u (B, *): integers (B,), tensors (B, *).

    >>> rows({"y": 3}, torch.zeros(2, 1))
    {'y': tensor([3, 3])}
    """

    def row(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.expand(len(u), *value.shape)
        dtype = torch.long if isinstance(value, int) else torch.float32
        return torch.full((len(u),), value, device=u.device, dtype=dtype)

    return _each(row, condition)


def _each(function: Callable[..., Any], *conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a function makes of each value of conditions of the same names, nested alike."""
    found: dict[str, Any] = {}
    for name in conditions[0]:
        values = [condition[name] for condition in conditions]
        nested = isinstance(values[0], Mapping)
        found[name] = _each(function, *values) if nested else function(*values)
    return found


def called(network: Any) -> str:
    """Return a network's name, for messages."""
    return getattr(network, "__name__", type(network).__name__)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _tensor(name: str, value: Any) -> Any:
    """Return a condition's value as a number, a tensor or a dictionary of these."""
    if isinstance(value, Mapping):
        return {k: _tensor(f"{name}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"condition.{name} must be a list of numbers, got {value!r} ({cause(error)})."
            ) from error
    if isinstance(value, str):
        path = Path(value).expanduser()
        if not path.is_file():
            raise InputError(f"condition.{name}: there is no file '{value}'.")
        held = read_checkpoint(path)
        tensors = list(held.values()) if isinstance(held, Mapping) else [held]
        if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
            raise InputError(f"condition.{name}: '{value}' must hold one tensor.")
        return tensors[0]
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise InputError(
            f"condition.{name} must be a number, a list, a tensor or a file, got {value!r}."
        )
    return value if isinstance(value, Tensor) else as_python(value)


def _parameters(network: nn.Module | Callable) -> dict[str, inspect.Parameter] | None:
    """Return the arguments besides x_t and its time, ``**`` too; None without a signature."""
    try:
        call = network.forward if isinstance(network, nn.Module) else network
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # built-in functions have no signature
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [p.name for p in parameters if p.kind in positional][:2]
    if "timestep" in [p.name for p in parameters]:  # transformers of diffusers
        first = [parameters[0].name, "timestep"]
    named = (*positional[1:], inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.name not in first and p.kind in named}


def _said(network: Any, attribute: str) -> Any:
    """Return an attribute of a network, or of its ``config``."""
    config = getattr(network, "config", None)
    if isinstance(config, Mapping):  # diffusers warns where its attributes are asked for instead
        return config.get(attribute, getattr(network, "__dict__", {}).get(attribute))
    return getattr(network, attribute, None)
