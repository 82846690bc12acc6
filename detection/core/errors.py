"""The one kind of error that the user can correct. Tools print its message without a traceback."""

import reprlib


class UserError(Exception):
    """Bad input: the message names the file, key or image, and says what to do."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shorten(value: object) -> str:
    """`repr` of something out of a file, for a message: cut where it is long or deep."""
    return _REPR.repr(value)
