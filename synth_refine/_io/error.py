"""The one error for bad input; it stands alone, so that the command line can name it without importing torch."""


class InputError(ValueError):
    """Bad input. The one-line message names the argument, what was expected and what came."""
