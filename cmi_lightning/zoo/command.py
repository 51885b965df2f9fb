"""``cmi-lightning priors``: what there is, and what of it is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cmi_lightning.errors import InputError
from cmi_lightning.zoo.cards import CARDS, Card


def priors(args: Sequence[str]) -> int:
    """Print the cards as a table."""
    if args:
        raise InputError(f"cmi-lightning priors takes no options, got '{args[0]}'.")
    head = ("name", "images", "size", "parameters", "licence", "here", "from")
    rows = [head, *map(_row, CARDS.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    for row in rows:
        print(*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1], sep="  ")
    return 0


def _row(card: Card) -> tuple[str, ...]:
    return (
        card.name,
        card.title,
        "×".join("any" if n is None else str(n) for n in card.image_shape),
        f"{card.parameters / 1e6:.1f} M",
        card.licence,
        "yes" if on_disk(card) else f"no, {card.size}",
        card.origin,
    )


def on_disk(card: Card) -> bool:
    """Whether the weights are in the package, in this folder, or in a cache."""
    if card.path:
        return card.path.is_file()
    if card.file:
        from cmi_lightning.denoisers.weights import cached

        names = (card.file.name, *card.file.other_names)
        return cached(card.file.url).is_file() or any(Path(name).is_file() for name in names)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # of the extra diffusers, which would have brought it here
        return False
    return isinstance(try_to_load_from_cache(str(card.repo), "model_index.json"), str)
