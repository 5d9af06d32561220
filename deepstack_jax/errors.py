"""What errors of every part have in common."""


def one_line(error: BaseException) -> str:
    """An exception's message in one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
