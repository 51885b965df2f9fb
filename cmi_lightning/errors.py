"""The one exception for what a user can mend, and the one way to warn."""

import logging
from functools import cache


class InputError(ValueError):
    """Bad input: one sentence that names the file or option and the remedy.

    The command line prints it alone and exits with code 2.

    >>> raise InputError("data.size must be at least 1, got 0.")
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: data.size must be at least 1, got 0.
    """


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, to be told as the reason in ours."""
    return str(error).strip().partition("\n")[0]


def one_sentence(message: str) -> str:
    """Return a parser message on one line, without its repetitions."""
    parts = [part.strip(" -") for part in message.splitlines()]
    return " ".join(dict.fromkeys(part for part in parts if part))


@cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that a process has it."""
    logging.getLogger("cmi_lightning").warning(message)
