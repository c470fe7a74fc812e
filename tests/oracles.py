"""Independent oracles, written from the formulas, slow and in float64."""

import math

import numpy as np
import torch
from torch import Tensor


def mirror(position: int, size: int) -> int:
    """Walk a position back into [0, size), turning round at the border pixels."""
    if size == 1:
        return 0
    while not 0 <= position < size:
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def neighbours(height: int, width: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """(Hq, Wq, k * k) flat key indices of every query's neighbourhood."""
    radius = kernel_size // 2
    index = np.zeros((-(-height // stride), -(-width // stride), kernel_size**2), int)
    for y in range(index.shape[0]):
        for x in range(index.shape[1]):
            rows = [mirror(y * stride + i * dilation, height) for i in range(-radius, radius + 1)]
            cols = [mirror(x * stride + i * dilation, width) for i in range(-radius, radius + 1)]
            index[y, x] = [row * width + col for row in rows for col in cols]
    return torch.from_numpy(index)


def local_attention(query, key, value, kernel_size, stride=1, dilation=1, scale=None) -> Tensor:
    """softmax(scale * q . k) v over unfolded neighbourhoods, differentiable, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    scale = 1 / math.sqrt(query.size(2)) if scale is None else scale
    index = neighbours(*key.shape[-2:], kernel_size, stride, dilation)
    unfolded_key = key.flatten(3)[..., index]  # (B, N, d, Hq, Wq, k * k)
    unfolded_value = value.flatten(3)[..., index]
    logits = scale * (query[..., None] * unfolded_key).sum(2)
    # Of a query with an infinite logit, no weight is a number.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return (weights[:, :, None] * unfolded_value).sum(-1)
