"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Bad input: one sentence that names the file or option and the remedy.

    The command line prints it alone and exits with code 2.
    """
