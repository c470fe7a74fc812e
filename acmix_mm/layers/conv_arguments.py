"""Arguments and attributes of nn.Conv2d, for layers that stand in for one."""

from torch import nn

from ..ops._checks import check_positive


def set_conv_attributes(
    layer: nn.Module,
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> None:
    """Check the arguments of a square, same-padded convolution; set them as nn.Conv2d would.

    mmcv's ConvModule and others read these attributes. Being plain values, they may be set before
    ``nn.Module.__init__``.

    Args:
        layer (nn.Module): Gets the attributes.
        in_channels (int): Input channels, a multiple of ``groups``.
        out_channels (int): Output channels, a multiple of ``groups``.
        kernel_size (int | tuple[int, int]): Side of the kernel, odd.
        stride (int | tuple[int, int]): Stride.
        padding (str | int | tuple[int, int]): 'same', or its value in pixels,
            ``dilation * (kernel_size // 2)``.
        dilation (int | tuple[int, int]): Dilation.
        groups (int): Groups.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """
    kernel_size = _square('kernel_size', kernel_size)
    stride = _square('stride', stride)
    dilation = _square('dilation', dilation)
    check_positive('kernel_size', kernel_size, odd=True)
    for name, value in (
        ('in_channels', in_channels),
        ('out_channels', out_channels),
        ('stride', stride),
        ('dilation', dilation),
        ('groups', groups),
    ):
        check_positive(name, value)
    check_divisible('in_channels', in_channels, 'groups', groups)
    check_divisible('out_channels', out_channels, 'groups', groups)
    same = dilation * (kernel_size // 2)
    if padding != 'same' and _square('padding', padding) != same:
        raise ValueError(
            f"padding must be 'same' or {same} for kernel_size {kernel_size} and dilation "
            f'{dilation}, got {padding!r}'
        )
    layer.in_channels = in_channels
    layer.out_channels = out_channels
    layer.kernel_size = (kernel_size, kernel_size)
    layer.stride = (stride, stride)
    layer.padding = (same, same)
    layer.output_padding = (0, 0)
    layer.dilation = (dilation, dilation)
    layer.groups = groups
    layer.transposed = False


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a multiple of ``divisor``."""
    if value % divisor:
        raise ValueError(f'{name} must be divisible by {divisor_name} ({divisor}), got {value}')


def _square(name: str, value: int | tuple[int, int]) -> int:
    """One integer from an integer or a pair of equal integers, as configs give either."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f'{name} must be an integer or a pair of equal integers, got {value}')
        value = value[0]
    return value
