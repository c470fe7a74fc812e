"""Checks of arguments that operators and layers share."""


def check_positive(name: str, value: int, odd: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer >= 1, and odd where asked."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < 1 or (odd and value % 2 == 0):
        allowed = 'a positive odd integer' if odd else 'a positive integer'
        raise ValueError(f'{name} must be {allowed}, got {value!r}')
