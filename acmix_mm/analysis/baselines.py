"""What the operators are measured against: the same, unfolded into memory or by other packages."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ACmix, PatchACmix
from ..ops._reflection import reflect, reflect_pad
from ..ops.fused_acmix import position_encoding
from .steps import Case, Unavailable


def unfold(maps: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """(B, N, d, H, W) -> (B, N, d, kernel_size^2, queries), neighbourhoods copied into memory."""
    padded = reflect_pad(maps.flatten(1, 2), kernel_size // 2).to(maps.dtype)
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
    """:func:`acmix_mm.ops.local_attention` by torch's FlexAttention, with a mask of blocks.

    Maps come as sequences (B, N, H W, d), in tiles of 8x16 pixels, so that one block of 128 queries
    needs few blocks of keys. Keys and values are reflected at the border as part of the call.
    """

    BLOCK, TILE = 128, (8, 16)

    def __init__(self, case: Case, kernel_size: int):
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        if case.train and case.device == 'cpu':
            raise Unavailable('no backward on CPUs')
        self.size = height, width = case.shape[-2:]
        reach = kernel_size // 2
        padded = (height + 2 * reach, width + 2 * reach)
        self.order, key_order = self._tiled(*self.size), self._tiled(*padded)
        pixels = torch.arange(height * width).view(1, 1, height, width)
        # Only floating-point numbers are padded by reflection.
        pixels = reflect_pad(pixels.double(), reach).long().flatten()[key_order]
        self.reflected = self.order.argsort()[pixels]  # places of what a padded sequence holds

        y, x = self.order // width, self.order % width
        key_y, key_x = key_order // padded[1], key_order % padded[1]
        places = key_order.argsort().view(padded)
        blocks = [-(-len(order) // self.BLOCK) for order in (self.order, key_order)]
        needed = torch.zeros(blocks, dtype=torch.bool)
        for dy in range(kernel_size):
            for dx in range(kernel_size):
                keys = places[y + dy, x + dx]
                needed[torch.arange(len(keys)) // self.BLOCK, keys // self.BLOCK] = True
        y, x, key_y, key_x, needed, self.order, self.reflected = (
            t.to(case.device) for t in (y, x, key_y, key_x, needed, self.order, self.reflected)
        )

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            rows = (key_y[key] - y[query] - reach).abs() <= reach
            return rows & ((key_x[key] - x[query] - reach).abs() <= reach)

        self.mask = BlockMask.from_kv_blocks(
            needed.sum(-1, dtype=torch.int32)[None, None],
            needed.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
            BLOCK_SIZE=self.BLOCK,
            mask_mod=near,
            seq_lengths=(len(self.order), len(key_order)),
        )
        torch.compiler.reset()  # shapes of earlier cases would count towards the recompile limit
        self.attention = torch.compile(flex_attention, dynamic=False)

    def _tiled(self, height: int, width: int) -> Tensor:
        """Pixels of a map, row by row within its tiles."""
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        tile_y, tile_x = (p // t for p, t in zip((y, x), self.TILE, strict=True))
        return (tile_y * width + tile_x).flatten().argsort(stable=True)

    def arrange(self, maps: Tensor) -> Tensor:
        """(B, N, d, H, W) -> (B, N, H W, d)."""
        return maps.flatten(3)[..., self.order].transpose(2, 3).contiguous()

    def restore(self, sequences: Tensor) -> Tensor:
        """The inverse of :meth:`arrange`."""
        return sequences.transpose(2, 3)[..., self.order.argsort()].unflatten(3, self.size)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (maps.index_select(2, self.reflected) for maps in (key, value))
        return self.attention(query, key, value, block_mask=self.mask)


class NATTEN:
    """The same by the package NATTEN (0.20 or later), for maps as it takes them: (B, H, W, N, d).

    Its neighbourhoods move inwards at the border: maps are padded by reflection, and the result is
    cropped, as part of the call. It has no kernels for CPUs: there it computes the scores of all
    pairs of pixels, of which no more than ``MAX_SCORES`` are asked for.
    """

    MAX_SCORES = 2**28

    def __init__(self, case: Case, kernel_size: int):
        try:
            import natten
        except ImportError:
            raise Unavailable('not installed') from None
        reach = kernel_size // 2
        if case.device == 'cpu':
            pixels = math.prod(size + 2 * reach for size in case.shape[-2:])
            if math.prod(case.shape[:2]) * pixels**2 > self.MAX_SCORES:
                raise Unavailable('too large without kernels')
            if case.train:
                raise Unavailable('no backward on CPUs')
        elif not natten.HAS_LIBNATTEN:
            raise Unavailable('built without kernels')
        self.attention = functools.partial(natten.na2d, kernel_size=kernel_size)
        self.reflected = [
            reflect(torch.arange(-reach, size + reach, device=case.device), size)
            for size in case.shape[-2:]
        ]
        self.inside = [slice(reach, reach + size) for size in case.shape[-2:]]

    def arrange(self, maps: Tensor) -> Tensor:
        """(B, N, d, H, W) -> (B, H, W, N, d)."""
        return maps.permute(0, 3, 4, 1, 2).contiguous()

    def restore(self, maps: Tensor) -> Tensor:
        """The inverse of :meth:`arrange`."""
        return maps.permute(0, 3, 4, 1, 2)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, columns = self.reflected
        padded = (m.index_select(1, rows).index_select(2, columns) for m in (query, key, value))
        return self.attention(*padded)[:, self.inside[0], self.inside[1]]
