"""What the operators are measured against: the same, unfolded into memory, and FlexAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ACmix, PatchACmix
from ..ops._reflection import reflect_pad
from ..ops.fused_acmix import position_encoding


def unfold(maps: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """(B, N, d, H, W) -> (B, N, d, kernel_size^2, queries), neighbourhoods copied into memory."""
    padded = reflect_pad(maps.flatten(1, 2), kernel_size // 2)
    columns = F.unfold(padded, kernel_size, stride=stride)
    return columns.view(*maps.shape[:3], kernel_size**2, columns.size(-1))


def subsample(maps: Tensor, stride: int = 1) -> Tensor:
    """(B, N, d, H, W) -> (B, N, d, 1, queries)."""
    return maps[..., ::stride, ::stride].flatten(3).unsqueeze(3)


def unfold_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int = 1,
    relative: Tensor | None = None,
) -> Tensor:
    """Attention (B, N, d, queries) of maps (B, N, d, H, W); ``relative`` is added to the keys."""
    keys = unfold(key, kernel_size, stride)
    if relative is not None:
        keys = keys + relative
    logits = (subsample(query, stride) * keys).sum(2, keepdim=True)
    del keys  # not to be held beside the values
    weights = (logits * query.size(2) ** -0.5).softmax(3)
    return (weights * unfold(value, kernel_size, stride)).sum(3)


class UnfoldACmix(ACmix):
    """The operator as it is usually written, at dilation 1: neighbourhoods unfolded into memory.

    Every key, value and relative position is copied kernel_size^2 times, and the convolution path
    keeps its intermediate map. Same parameters and results as :class:`ACmix`.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel_size, stride = self.attn_kernel_size, self.stride[0]
        heads, dim = self.num_heads, self.head_dim
        query, key, value = (
            F.conv2d(x, p['weight'], p['bias']).unflatten(1, (heads, dim))
            for p in (self.conv1, self.conv2, self.conv3)
        )
        position = position_encoding(self.conv_p['weight'].flatten(1), key)[None, None]

        relative = subsample(position, stride) - unfold(position, kernel_size, stride)
        attention = unfold_attention(query, key, value, kernel_size, stride, relative)

        maps = torch.cat([m.flatten(2, 3) for m in (query, key, value)], 1)
        mixed = F.conv2d(maps, self.fc['weight'])
        mixed = mixed.unflatten(2, (dim, -1)).transpose(1, 2).flatten(1, 2)
        padding = self.kernel_size[0] // 2
        convolution = F.conv2d(mixed, self.dep_conv['weight'], None, stride, padding, 1, dim)
        attention = attention.reshape(convolution.shape)
        return self.rate1 * attention + self.rate2 * convolution


class UnfoldPatchACmix(PatchACmix):
    """SAN's operator as it is usually written: patches of keys and of values unfolded into memory.

    Same parameters and results as :class:`PatchACmix`.
    """

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is not None:
            x = F.relu(norm(x))
        kernel_size = self.attn_kernel_size
        query, key, value = self.conv1(x), self.conv2(x), self.conv3(x)
        patch = unfold(key[:, None], kernel_size).flatten(1, 3).unsqueeze(2)
        weights = self.conv_w(torch.cat([query.flatten(2).unsqueeze(2), patch], 1))
        del patch  # not to be held beside the values
        weights = weights.view(x.size(0), 1, -1, kernel_size**2, weights.size(-1))
        values = unfold(value.unflatten(1, (-1, weights.size(2))), kernel_size)
        attention = (weights * values).sum(3).view_as(value)
        maps = torch.cat([query, key, value], 1).unflatten(1, (6, -1)).transpose(1, 2)
        return self.mixing_weights().mix(maps, attention, self.backend)


UNFOLDED = {ACmix: UnfoldACmix, PatchACmix: UnfoldPatchACmix}
UNFOLD_BACKBONES = ('ACmixResNet', 'ACmixSAN')  # those made of these layers


def unfold_operators(model: nn.Module) -> None:
    """Bring all layers of ours that have one into their unfold formulation, in place."""
    for module in model.modules():
        module.__class__ = UNFOLDED.get(type(module), type(module))


class FlexAttention:
    """torch's FlexAttention over pixels, every query with a full neighbourhood.

    What differs from :func:`acmix_mm.ops.local_attention`: near the border the neighbourhood is
    moved inwards, not reflected; maps come as sequences (B, N, H W, d), in tiles of 8x16 pixels, so
    that one block of 128 queries needs few blocks of keys. The arithmetic asked for is the same.
    """

    BLOCK, TILE = 128, (8, 16)

    def __init__(self, size: tuple[int, int], device: str, kernel_size: int = 7):
        from torch.nn.attention.flex_attention import BlockMask

        self.size = height, width = size
        radius = kernel_size // 2
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        tile_y, tile_x = (p // t for p, t in zip((y, x), self.TILE, strict=True))
        self.order = (tile_y * width + tile_x).flatten().argsort(stable=True)
        place = self.order.argsort().view(height, width)  # of a pixel in the sequence
        y, x = (p.flatten()[self.order] for p in (y, x))
        centre_y = y.clamp(radius, height - 1 - radius)
        centre_x = x.clamp(radius, width - 1 - radius)

        length = height * width
        blocks = -(-length // self.BLOCK)
        needed = torch.zeros(blocks, blocks, dtype=torch.bool)
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                keys = place[centre_y + dy, centre_x + dx]
                needed[torch.arange(length) // self.BLOCK, keys // self.BLOCK] = True
        self.order, needed = self.order.to(device), needed.to(device)
        y, x, centre_y, centre_x = (t.to(device) for t in (y, x, centre_y, centre_x))

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            rows = (centre_y[query] - y[key]).abs() <= radius
            return rows & ((centre_x[query] - x[key]).abs() <= radius)

        self.mask = BlockMask.from_kv_blocks(
            needed.sum(-1, dtype=torch.int32)[None, None],
            needed.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
            BLOCK_SIZE=self.BLOCK,
            mask_mod=near,
            seq_lengths=(length, length),
        )

    def sequence(self, maps: Tensor) -> Tensor:
        return maps.flatten(3)[..., self.order].transpose(2, 3).contiguous()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=self.mask)
