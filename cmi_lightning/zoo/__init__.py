"""Priors by name: cards of public networks, and :func:`load_prior`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cmi_lightning.zoo.cards import CARDS, Card, File, card

if TYPE_CHECKING:
    from cmi_lightning.zoo.load import load_prior

__all__ = ["CARDS", "Card", "File", "card", "load_prior"]


def __getattr__(name: str) -> Any:
    # Late, as the denoisers read the cards.
    if name == "load_prior":
        from cmi_lightning.zoo.load import load_prior

        return load_prior
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
