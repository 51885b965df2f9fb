"""Images that depend on each other: crops of one photograph, say."""

from __future__ import annotations

import re
from collections.abc import Callable

from cmi_lightning.errors import InputError


def clusters_by(rule: str) -> Callable[[str], str]:
    r"""Return what takes an image's id to its cluster, by a separator or a group of a pattern.

    Raises:
        InputError: naming the option ``cluster``, for a rule that is neither, and of an id that
            does not match.

    Example:
        >>> clusters_by("/")("lake/3"), clusters_by(r"^(\w+)_")("lake_3")
        ('lake', 'lake')
    """
    if not rule:
        raise InputError("cluster: give a separator, or a regular expression with a group.")
    if "(" not in rule:
        return lambda image: image.rpartition(rule)[0] or image
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise InputError(f"cluster: '{rule}' is no pattern: {error}.") from error
    if pattern.groups != 1:
        raise InputError(f"cluster: '{rule}' needs one group, and has {pattern.groups}.")

    def cluster(image: str) -> str:
        if (match := pattern.search(image)) is None or match[1] is None:
            raise InputError(f"cluster: '{rule}' does not match the image '{image}'.")
        return match[1]

    return cluster
