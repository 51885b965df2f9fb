"""The one exception for what a user can mend, and words for messages."""

import logging
import re
import unicodedata
from functools import cache

UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of characters, separators of lines
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # would reorder a terminal
ON_COMMAND_LINE = False  # set by cli.main: messages name what the person who asks can type


class InputError(ValueError):
    r"""Bad input: one sentence that names the file or option and the remedy.

    The command line prints it alone and exits with code 2. Control characters, which names of files
    and tensors may hold, become escapes.

    >>> raise InputError("data.size must be at least 1, got 0.")
    Traceback (most recent call last):
    cmi_lightning.errors.InputError: data.size must be at least 1, got 0.
    >>> print(InputError(f"There is no file 'a{chr(27)}[31m'."))
    There is no file 'a\x1b[31m'.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


def printable(text: object) -> str:
    r"""Return a path as text (NFC) that any terminal, log or UTF-8 file can take.

    Controls and bytes that are not UTF-8 become escapes such as ``\x1b``.
    """
    seen = unicodedata.normalize("NFC", str(text))
    if seen.isascii() and seen.isprintable():
        return seen
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(c) in UNSEEN or c in DIRECTIONS
        else c
        for c in seen
    )


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "image"), counted(2, "pass")
    ('1 image', '2 passes')
    """
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural * (number != 1)}"


def wording(option: str, argument: str) -> str:
    """Return ``option`` if the command line asks, ``argument`` if Python does."""
    return option if ON_COMMAND_LINE else argument


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, to be told as the reason in ours."""
    return one_sentence(str(error).strip().partition("\n")[0] if not _of_worker(error) else error)


def cause(error: BaseException) -> str:
    """Return another library's error as the cause that a sentence of ours tells.

    >>> cause(KeyError("a"))
    "KeyError: 'a'"
    """
    return f"{type(error).__name__}: {first_line(error)}"


def one_sentence(message: object) -> str:
    r"""Return a message on one line, without its repetitions; of a worker's, its last line.

    >>> one_sentence("Several reasons:\n  - this\n  - that\n--model.seed is one")
    'Several reasons: this that --model.seed is one'
    """
    lines = str(message).splitlines()
    if _of_worker(message):
        lines = [re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1] if lines[-1] else lines[-2])]
    parts = [re.sub(r"^[\s-]+(?=\s)|\s-*\s*$", "", part).strip() for part in lines]
    return " ".join(dict.fromkeys(part for part in parts if part))


def _of_worker(message: object) -> bool:
    """Whether a loader's worker process has put its traceback into the message."""
    text = str(message)
    return text.startswith("Caught ") and "Original Traceback" in text


@cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that a process has it."""
    logging.getLogger("cmi_lightning").warning(message)
