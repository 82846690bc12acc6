"""The one kind of error that is the user's to mend. Tools print its message alone, without a traceback."""


class UserError(Exception):
    """Bad input: the message names the file, key or image, and says what to do."""
