"""Reflection at the border, as often as a small map needs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reflect(index: Tensor, size: int) -> Tensor:
    """Map positions outside ``[0, size)`` into it by reflection at the border pixels.

    Args:
        index (Tensor): Integer positions, any shape.
        size (int): Number of pixels of the axis, >= 1.

    Returns:
        Tensor: Positions in ``[0, size)``. Reflection repeats as often as needed; on an axis of one
        pixel every position is that pixel.
    """
    # The size as a tensor: as a symbol of torch.export it has no remainder in ONNX.
    last = torch.arange(size, device=index.device)[-1]
    period = (2 * last).clamp(min=1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def reflect_pad(maps: Tensor, pixels: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H + 2 * pixels, W + 2 * pixels), for any H, W >= 1.

    Half precision becomes float32 where one reflection is not enough: a pixel's gradient is then a
    sum over up to hundreds of places, which is rounded once.
    """
    # Where one reflection is enough. Sizes may be symbols of torch.export, which have no answer.
    if all(isinstance(size, int) and size > pixels for size in maps.shape[-2:]):
        return F.pad(maps, (pixels,) * 4, mode='reflect')
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    for dim in (-2, -1):
        size = maps.size(dim)
        index = torch.arange(-pixels, size + pixels, device=maps.device)
        maps = maps.index_select(dim, reflect(index, size))
    return maps
