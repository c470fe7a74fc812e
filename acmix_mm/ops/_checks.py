"""Checks and sizes that operators and layers share."""

from torch import Tensor


def check_positive(name: str, value: int, odd: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer >= 1, and odd where asked."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < 1 or (odd and value % 2 == 0):
        allowed = 'a positive odd integer' if odd else 'a positive integer'
        raise ValueError(f'{name} must be {allowed}, got {value!r}')


def check_geometry(kernel_size: int, stride: int, dilation: int) -> None:
    """:func:`check_positive` for the three arguments that all neighbourhood operators have."""
    check_positive('kernel_size', kernel_size, odd=True)
    check_positive('stride', stride)
    check_positive('dilation', dilation)


def strided_size(maps: Tensor, stride: int) -> tuple[int, int]:
    """Height and width of (..., H, W) maps of which every ``stride``-th pixel is taken.

    The rounding up is written in the form of slices: torch.export cannot prove ``-(-H // stride)``
    equal.
    """
    height, width = maps.shape[-2:]
    return (height + stride - 1) // stride, (width + stride - 1) // stride
