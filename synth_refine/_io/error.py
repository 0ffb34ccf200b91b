"""The errors of this package: each is raised for input that cannot be used, in one line."""


class InputError(ValueError):
    """An argument has the wrong kind, type, shape, range or content."""


class WrongBase(InputError):
    """The labels at hand are not the ones that were refined."""


class WrongIds(InputError):
    """The ids of labels and images do not belong together."""
