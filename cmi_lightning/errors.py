"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Bad input: one sentence that names the file or option and the remedy.

    The command line prints it alone and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, to be told as the reason in ours."""
    return str(error).strip().partition("\n")[0]
