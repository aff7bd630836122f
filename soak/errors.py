"""What the soak ends with where a promise does not hold."""


class SoakError(Exception):
    """The message says which promise, and what was found."""
