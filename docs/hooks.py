"""MkDocs hooks: formulas become MathML, and docstrings Markdown, when the site is built."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every $$…$$ by MathML."""
    return re.sub(
        r"\$\$(.+?)\$\$",
        lambda match: convert(match[1].strip(), display="block").replace("\n", ""),
        markdown,
        flags=re.DOTALL,
    )


class Words(griffe.Extension):
    """Make Markdown of docstrings: no Sphinx roles, no emphasis from (B, *m)."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object before it is rendered."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"(?<=[(, ])\*(?=[\w,)])", r"\\*", text)
            text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
            fenced = r"```pycon\n\g<0>\n```"  # a doctest outside a section of examples
            text = re.sub(r"^>>> .*(?:\n.+)*", fenced, text, flags=re.MULTILINE)
            obj.docstring.value = text
