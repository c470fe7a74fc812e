"""Checks and sizes that operators and layers share."""

from torch import Tensor

# Products of two still fit into PyTorch's 64-bit integers.
LARGEST = 2**31 - 1


def check_positive(name: str, value: int, odd: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of 1 to LARGEST, and odd where asked."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < 1 or (odd and value % 2 == 0):
        allowed = 'a positive odd integer' if odd else 'a positive integer'
        raise ValueError(f'{name} must be {allowed}, got {value!r}')
    if value > LARGEST:
        raise ValueError(f'{name} must be at most {LARGEST}, got {value}')


def check_tensors(**tensors: Tensor) -> None:
    """Raise an error unless all are floating-point tensors, on one device.

    Raises:
        TypeError: If one is not.
        ValueError: If there are several devices.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f'{name} must be a floating-point tensor, got {got}')
    _check_one('device', tensors)


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all have one dtype; None is left out."""
    _check_one('dtype', {name: tensor for name, tensor in tensors.items() if tensor is not None})


def _check_one(what: str, tensors: dict[str, Tensor]) -> None:
    values = {name: getattr(tensor, what) for name, tensor in tensors.items()}
    first = next(iter(values.values()))
    if any(value != first for value in values.values()):
        *names, last = values
        raise ValueError(
            f'{", ".join(names)} and {last} must have one {what}, got '
            f'{", ".join(map(str, values.values()))}'
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Raise ``ValueError`` unless a tensor has a shape; ``why`` goes into the message."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f'{name} must have shape {expected} for {why}, got {tuple(tensor.shape)}')


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


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, stride: int, dilation: int
) -> None:
    """Raise an error unless arguments are as :func:`acmix_mm.ops.local_attention` has them.

    But for dtypes, which autocast makes equal.
    """
    check_geometry(kernel_size, stride, dilation)
    check_tensors(query=query, key=key, value=value)
    for name, tensor in (('query', query), ('key', key), ('value', value)):
        if tensor.dim() != 5:
            raise ValueError(
                f'{name} must have 5 dimensions (B, N, d, H, W), got shape {tuple(tensor.shape)}'
            )
    if min(key.shape[1:]) < 1:
        raise ValueError(f'key must have N, d, H, W >= 1, got shape {tuple(key.shape)}')
    if value.shape != key.shape:
        raise ValueError(
            f'value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}'
        )
    expected = (*key.shape[:3], *strided_size(key, stride))
    why = f'key of shape {tuple(key.shape)} and stride {stride}'
    check_shape('query', query, expected, why)
