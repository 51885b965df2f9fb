"""Images that depend on each other: crops of one photograph, say."""

from __future__ import annotations

import re

from cmi_lightning.errors import InputError


def cluster_of(image: str, rule: str) -> str:
    r"""Return the cluster of an image, by its id.

    Raises:
        InputError: if the id does not match the regular expression.

    Example:
        >>> cluster_of("lake/3", "/"), cluster_of("lake_3", r"^(\w+)_")
        ('lake', 'lake')
    """
    if "(" not in rule:
        return image.rpartition(rule)[0] or image
    if (match := re.search(rule, image)) is None or match[1] is None:
        raise InputError(f"cluster: '{rule}' does not match the image '{image}'.")
    return match[1]


def check_rule(rule: str) -> None:
    """Refuse what is neither a separator nor a regular expression with one group.

    Raises:
        InputError: naming the option ``cluster``.
    """
    if not rule:
        raise InputError("cluster: give a separator, or a regular expression with a group.")
    try:
        groups = re.compile(rule).groups if "(" in rule else 1
    except re.error as error:
        raise InputError(f"cluster: '{rule}' is no pattern: {error}.") from error
    if groups != 1:
        raise InputError(f"cluster: '{rule}' needs one group, and has {groups}.")
