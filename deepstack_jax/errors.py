"""Helpers for error messages of all parts."""


def one_line(error: BaseException) -> str:
    """Returns an exception's message on one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
