"""Division that rounds up."""


def cdiv(a: int, b: int) -> int:
    """The smallest integer that is at least a / b, for b > 0."""
    return -(-a // b)
