"""A checkpoint's tensors under a network's own names, and the cause where they do not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmi_lightning.errors import InputError

# What torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AUTOENCODER = re.compile(r"(?:^|\.)(first_stage_model|vae|vqvae|autoencoder)\.")
FOREIGN = {
    r"lora_(up|down|A|B)\b": "they are low-rank adapters (LoRA), which change a network",
    r"^(down_blocks|conv_in)\.": "they are in diffusers' layout, for DiffusersDenoiser",
    r"\bmap_(noise|layer0)\b": "they are NVlabs' EDM, for EDMDenoiser with its class as network",
    r"\ball_modules\.": "they are score_sde's: give its class as network",
    r"^(.*\.)?(init_conv|downs)\.": "they are of denoising-diffusion-pytorch: give its Unet",
}


def fitted(network: nn.Module, state: Any, path: Path, part: str | None) -> dict[str, Tensor]:
    """Return the tensors for ``network`` under its own names, from the one place they are in.

    ``part`` is the place's name, or components that no other has: "ema" of "state.ema.net".

    Raises:
        InputError: where no place has them all, several places have different ones and ``part``
            does not choose, or the network works on latents.
    """
    parts = dict(_parts(state))
    if not parts:
        raise InputError(f"'{path}' is not a state dict (a mapping of names to tensors).")
    whole = network.state_dict()
    names = {WRAPPERS.sub("", name): name for name in whole}
    own = {name: whole[theirs] for name, theirs in names.items()}
    for tensors in parts.values():
        if found := next(filter(None, map(AUTOENCODER.search, tensors.keys() - own.keys())), None):
            raise InputError(
                f"'{path}' holds an autoencoder ({found[1]}), so that its network works on latents "
                "and not on pixels: give a pipeline in diffusers' layout to "
                "cmi_lightning.zoo.load_prior, or use a network of pixels."
            )
    places: dict[str, tuple[int, dict[str, Tensor]]] = {}
    for label, tensors in parts.items():
        for prefix, count, inner in _places(own, tensors):
            places[f"{label}.{prefix}".strip(".")] = (count, inner)
    if part is not None:
        named = [p for p in places if p == part] or [p for p in places if f".{part}." in f".{p}."]
        if not named:
            raise InputError(
                f"'{path}' has no part '{part}' with tensors of the network; it has "
                f"{', '.join(repr(p) for p in list(places)[:5])}."
            )
        places = {p: places[p] for p in named}
    fits = [p for p, (_, inner) in places.items() if not any(_problems(own, inner).values())]
    if not fits:
        best = max(places, key=lambda p: (places[p][0], -len(p)))
        where = f" (its part '{best}')" if best else ""
        raise InputError(misfit(f"The weights '{path}'{where}", network, places[best][1]))
    first = places[fits[0]][1]
    others = [p for p in fits[1:] if any(not torch.equal(first[k], places[p][1][k]) for k in own)]
    if others:
        raise InputError(several(f"'{path}'", [fits[0], *others]))
    return {theirs: first[name] for name, theirs in names.items()}


def several(what: str, places: list[str]) -> str:
    """Return the sentence on a network that is there more than once."""
    average = [p for p in places if re.search("ema|averag|shadow", p)]
    if any(p.startswith("current_model_state") for p in places):  # as Lightning names them
        average = [p for p in places if p.startswith("state_dict")]
    return (
        f"{what} holds the network {len(places)} times, as {', '.join(map(repr, places))}: choose "
        f"one by weights_part (an average, '{average[0] if average else 'ema'}', is usually the "
        "better one)."
    )


def _parts(state: Any, label: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (dotted name, tensors by name) of every mapping of tensors in a checkpoint."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return
    tensors = {WRAPPERS.sub("", k): v for k, v in state.items() if isinstance(v, Tensor)}
    if tensors:
        yield label, tensors
    if depth:
        for key, value in state.items():
            yield from _parts(value, f"{label}.{key}".lstrip("."), depth - 1)


def _places(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Yield (prefix, names in common, tensors behind it) where any of the network's names are."""
    prefixes = Counter(
        prefix for name in tensors for prefix in _prefixes(name) if name[len(prefix) :] in own
    )
    for prefix, count in (prefixes or {"": 0}).items():
        inside = [q for q in prefixes if q != prefix and q.startswith(prefix)]
        copies = tuple(q for q in inside if 2 * prefixes[q] > len(own))  # of the whole network
        mine = [k for k in tensors if k.startswith(prefix) and not k.startswith(copies)]
        yield prefix, count, {k[len(prefix) :]: tensors[k] for k in mine}
    # LitEma, of latent diffusion, takes the dots out of names: model_ema.<prefix>inputblocks00…
    plain = {name.replace(".", ""): name for name in own}
    longest = max(plain, key=len, default="")
    for name in [n for n in tensors if "." in plain.get(longest, "") and n.endswith(longest)]:
        head, _, tail = name.rpartition(".")
        start = len(name) - len(longest)
        inner = {k[start:]: v for k, v in tensors.items() if k.startswith(name[:start])}
        for counter in ("decay", "num_updates"):
            inner.pop(counter, None)
        dotted = {plain.get(k, k): v for k, v in inner.items()}
        yield head or tail[: -len(longest)], len(dotted), dotted


def _prefixes(name: str) -> Iterator[str]:
    """Yield "", "a.", "a.b.", … of a dotted name."""
    yield ""
    for match in list(re.finditer(r"\.", name))[:6]:
        yield name[: match.end()]


def _problems(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshapen": [n for n in own if n in state and state[n].shape != own[n].shape],
    }


def misfit(what: str, network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return the sentence on ``state`` that does not fit: counts, first names, likely cause."""
    own = network.state_dict()
    problems = _problems(own, state)

    def text(kind: str, name: str) -> str:
        if kind != "misshapen":
            return name
        return f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"

    found = "; ".join(
        f"{len(names)} {kind} ({', '.join(text(kind, n) for n in names[:5])}"
        f"{', …' if len(names) > 5 else ''})"
        for kind, names in problems.items()
        if names
    )
    return f"{what} do not fit the network: {found}; {_cause(own, state, problems)}."


def _cause(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], problems: dict[str, list[str]]
) -> str:
    """Return the likely cause of a misfit, and what to change."""
    missing, unexpected, misshapen = problems.values()
    common = [name for name in own if name in state]
    strangers = missing + unexpected

    def ratio(name: str) -> float:
        """Output channels in the file relative to the network's, 0 if more than these differ."""
        there, here = state[name].shape, own[name].shape
        return there[0] / here[0] if here and there[1:] == here[1:] else 0.0

    if not common:
        for pattern, cause in FOREIGN.items():
            if any(re.search(pattern, name) for name in state):
                return f"no name agrees: {cause}"
        return "no name agrees, so that they belong to another architecture"
    if any(re.search("transformer_blocks|attn2", name) for name in unexpected):
        return "they belong to a network that is told a text, and this one is not"
    if any(re.search("label_emb|class_emb|map_label", name) for name in unexpected):
        return "they belong to a class-conditional network, and this one has no classes"
    if misshapen and not strangers and set(misshapen) <= set(list(own)[-2:]):
        if all(ratio(name) == 2 for name in misshapen):
            return (
                "they predict a variance as well (twice the output channels), so that the network "
                "needs learn_variance: true (diffusers: out_channels)"
            )
        if all(ratio(name) == 0.5 for name in misshapen):
            return (
                "they predict no variance (half the output channels), so that the network needs "
                "learn_variance: false (diffusers: out_channels)"
            )
    convolution = next((name for name in common if own[name].ndim == 4), None)
    if convolution in misshapen:
        there, here = state[convolution].shape, own[convolution].shape
        if there[0] == here[0] and there[1] != here[1]:
            return f"they are for images of {there[1]} channels and the network for {here[1]}"
    if misshapen and not strangers and all("emb_layers" in name for name in misshapen):
        return "they differ in scale_shift, whether the time embedding scales or is added"
    if len(strangers) > 10 and _blocks(own) != _blocks(state):
        return (
            "the network has another number of levels or of blocks per level (channel_mult, "
            "num_res_blocks)"
        )
    if 2 * len(misshapen) >= len(common):
        name = convolution if convolution in misshapen else misshapen[0]
        return (
            f"the network has another width: {name} has {state[name].shape[0]} channels in the "
            f"file and {own[name].shape[0]} here (model_channels, channel_mult)"
        )
    if any(re.search("qkv|attn|attention|to_q", name) for name in strangers):
        return "attention sits at other levels of the network (attention_levels)"
    return "the network's options must be those the weights were trained with"


def _blocks(names: Mapping[str, Tensor]) -> set[str]:
    """Return the names up to their first number, such as "input_blocks.3"."""
    return {match.group() for name in names if (match := re.match(r"\D*\d+", name))}
