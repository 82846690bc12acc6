"""`UserError`, the error for mistakes that the user can correct. Commands print its message without a traceback."""

import reprlib


class UserError(Exception):
    """Bad input: the message names the file, key or image, and says what to do."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shorten(value: object) -> str:
    """`repr` of a value from a file, for a message; long and deeply nested values are shortened."""
    return _REPR.repr(value)
