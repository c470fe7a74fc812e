"""Neighbourhood attention in plain PyTorch: every device, every floating dtype.

Queries are taken in small tiles. All queries of a tile attend to the tile's key region (the union
of their neighbourhoods) in one matrix product, with what lies outside a query's own neighbourhood
masked. That costs about three times the arithmetic of the neighbourhoods alone, but it is
arithmetic that BLAS does at full speed, where a loop over the neighbourhood's offsets is bound by
memory. Tiles are worked off in chunks of bounded size, so nothing of the size of an unfolded map
ever exists; the backward pass recomputes each chunk's attention weights, so training keeps query,
key and value only.

A masked entry of a product is a zero, and zero times NaN or infinity is NaN: such a number would
reach all queries of a tile. So a call whose results are not all finite is repeated carefully, with
products that leave out what is masked.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autograd import refuse_second_order, spread, transformed
from .._reflection import reflect
from ..export import unrolled_local_attention

# Queries in a tile, (rows, columns). Of the shapes tried (4x4 to 8x16) on maps of 25x38 to
# 200x304 this was the fastest, or within noise of it.
TILE = (4, 8)

# Bytes for one chunk of tiles. On a CPU a chunk should stay in the caches; elsewhere it should be
# large enough to fill the device.
CHUNK_BYTES = {'cpu': 4 << 20}
CHUNK_BYTES_DEFAULT = 256 << 20


@dataclass(frozen=True)
class _Axis:
    """How one spatial axis is padded and cut into tiles.

    With dilation, queries are worked off in ``phases``: every ``phases``-th query, whose keys all
    lie on every ``dilation``-th position. On those keys, the neighbourhoods of a phase are
    undilated, with stride ``step``.
    """

    size: int  # of key and value
    queries: int
    kernel_size: int
    stride: int
    dilation: int
    tile: int

    @property
    def phases(self) -> int:
        return self.dilation // math.gcd(self.dilation, self.stride)

    @property
    def step(self) -> int:
        return self.stride // math.gcd(self.dilation, self.stride)

    @property
    def before(self) -> int:
        return self.kernel_size // 2 * self.dilation

    def tiles(self, phase: int) -> int:
        return -(-len(range(phase, self.queries, self.phases)) // self.tile)

    @property
    def region(self) -> int:
        """Number of keys that a tile of queries sees."""
        return (self.tile - 1) * self.step + self.kernel_size

    def extent(self, phase: int) -> int:
        """Number of keys that all tiles of a phase see."""
        return (self.tiles(phase) * self.tile - 1) * self.step + self.kernel_size

    def keys(self, phase: int) -> slice:
        """Where those keys lie on the padded axis."""
        start = phase * self.stride
        return slice(start, start + (self.extent(phase) - 1) * self.dilation + 1, self.dilation)

    @property
    def padded(self) -> int:
        ends = [self.keys(phase).stop for phase in range(min(self.phases, self.queries))]
        return max(self.before + self.size, *ends)

    def border(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Padded positions outside the map, and the padded positions inside that they mirror."""
        position = torch.arange(self.padded, device=device) - self.before
        position = position[(position < 0) | (position >= self.size)]
        return position + self.before, reflect(position, self.size) + self.before

    def pad_(self, maps: Tensor, dim: int) -> None:
        """Fills the border of ``maps``, which are padded along ``dim``, by reflection."""
        outside, mirrored = self.border(maps.device)
        maps.index_copy_(dim, outside, maps.index_select(dim, mirrored))

    def unpad_(self, grad: Tensor, dim: int) -> Tensor:
        """Adjoint of padding: adds the border's gradient to the pixels it mirrors, in place.

        Returns the view of ``grad`` without border.
        """
        outside, mirrored = self.border(grad.device)
        grad.index_add_(dim, mirrored, grad.index_select(dim, outside))
        return grad.narrow(dim, self.before, self.size)

    def inside(self, device: torch.device) -> Tensor:
        """(tile, region) bool: does the tile's query have that key in its neighbourhood?"""
        query = torch.arange(self.tile, device=device)[:, None] * self.step
        offset = torch.arange(self.region, device=device)[None] - query
        return (offset >= 0) & (offset < self.kernel_size)


class _Plan:
    """Cuts one call into samples, phases and chunks of tiles; forward and backward share it.

    If ``careful``, numbers that are not finite stay within neighbourhoods.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        kernel_size: int,
        stride: int,
        dilation: int,
        careful: bool,
    ):
        def axis(dim: int) -> _Axis:
            queries = query.size(dim)
            tile = min(TILE[dim], queries)
            # Reflection is periodic; all strides beyond the map are the same.
            size = key.size(dim)
            every, apart = min(stride, size), (dilation - 1) % max(1, 2 * (size - 1)) + 1
            return _Axis(size, queries, kernel_size, every, apart, tile)

        self.rows, self.cols = axis(-2), axis(-1)
        self.device = query.device
        self.dtype = query.dtype
        # Half precision is for storage; logits, softmax and sums are kept in float32.
        self.compute_dtype = torch.promote_types(query.dtype, torch.float32)
        self.careful = careful
        self.neighbours = (
            self.rows.inside(self.device)[:, None, :, None]
            & self.cols.inside(self.device)[None, :, None, :]
        ).reshape(self.rows.tile * self.cols.tile, -1)
        shape = self.neighbours.shape
        self.mask = torch.zeros(shape, dtype=self.compute_dtype, device=self.device)
        self.mask.masked_fill_(~self.neighbours, -math.inf)

        heads, dim = query.shape[1:3]
        num_queries, num_keys = shape
        # Logits and their gradient, tiles of key and value and of their gradients, of query,
        # output and their gradients.
        tile_bytes = self.mask.element_size() * (
            2 * num_queries * num_keys + 4 * dim * num_keys + 4 * dim * num_queries
        )
        chunk_bytes = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES_DEFAULT)
        tiles_in_chunk = max(1, chunk_bytes // tile_bytes)
        row_tiles = max(1, heads * self.cols.tiles(0))
        self.tile_rows = max(1, tiles_in_chunk // row_tiles)
        self.samples = max(1, tiles_in_chunk // (row_tiles * self.rows.tiles(0)))

    def batches(self, size: int) -> Iterator[slice]:
        for start in range(0, size, self.samples):
            yield slice(start, start + self.samples)

    def phases(self) -> Iterator[tuple[int, int]]:
        for y in range(min(self.rows.phases, self.rows.queries)):
            for x in range(min(self.cols.phases, self.cols.queries)):
                yield y, x

    def chunks(self, phase: tuple[int, int]) -> Iterator[slice]:
        total = self.rows.tiles(phase[0])
        for start in range(0, total, self.tile_rows):
            yield slice(start, min(total, start + self.tile_rows))

    def pad(self, maps: Tensor) -> Tensor:
        """(b, N, d, H, W) -> (b * N, d, padded H, padded W), in the compute dtype."""
        rows, cols = self.rows, self.cols
        padded = maps.new_empty(
            (*maps.shape[:3], rows.padded, cols.padded), dtype=self.compute_dtype
        )
        inner = padded.narrow(3, rows.before, rows.size)
        inner.narrow(4, cols.before, cols.size).copy_(maps)
        cols.pad_(inner, 4)
        rows.pad_(padded, 3)
        return padded.flatten(0, 1)

    def regions(self, padded: Tensor, phase: tuple[int, int]) -> Tensor:
        """Overlapping view (maps, d, tile rows, tile columns, region height, region width)."""
        rows, cols = self.rows, self.cols
        view = padded[:, :, rows.keys(phase[0]), cols.keys(phase[1])]
        view = view.unfold(2, rows.region, rows.tile * rows.step)
        return view.unfold(3, cols.region, cols.tile * cols.step)

    def tiles(self, maps: Tensor, phase: tuple[int, int]) -> Tensor:
        """(b, N, d, Hq, Wq) -> (b * N, d, tile rows, tile height, tile columns, tile width)."""
        y, x = phase
        maps = maps[..., y :: self.rows.phases, x :: self.cols.phases].flatten(0, 1)
        ny, nx = self.rows.tiles(y), self.cols.tiles(x)
        height, width = ny * self.rows.tile, nx * self.cols.tile
        maps = F.pad(maps, (0, width - maps.size(-1), 0, height - maps.size(-2)))
        return maps.unflatten(3, (nx, self.cols.tile)).unflatten(2, (ny, self.rows.tile))

    def write(self, target: Tensor, tiles: Tensor, phase: tuple[int, int]) -> None:
        """Inverse of :meth:`tiles`: ``target`` (b, N, d, Hq, Wq) takes what lies inside it."""
        maps = tiles.flatten(4, 5).flatten(2, 3).unflatten(0, target.shape[:2])
        target = target[..., phase[0] :: self.rows.phases, phase[1] :: self.cols.phases]
        target.copy_(maps[..., : target.size(-2), : target.size(-1)])

    def gather_queries(self, tiles: Tensor, chunk: slice) -> Tensor:
        """Chunk of tiles as matrices (T, d, queries of a tile)."""
        part = tiles[:, :, chunk].permute(0, 2, 4, 1, 3, 5)
        return part.reshape(-1, tiles.size(1), self.mask.size(0)).to(self.compute_dtype)

    def scatter_queries(self, tiles: Tensor, chunk: slice, values: Tensor) -> None:
        part = tiles[:, :, chunk].permute(0, 2, 4, 1, 3, 5)
        part.copy_(values.view(part.shape))

    def gather_keys(self, regions: Tensor, chunk: slice) -> Tensor:
        """Chunk of key regions as matrices (T, d, keys of a region)."""
        part = regions[:, :, chunk].permute(0, 2, 3, 1, 4, 5)
        return part.reshape(-1, regions.size(1), self.mask.size(1))

    def add_keys_(self, regions: Tensor, chunk: slice, values: Tensor) -> None:
        """Adds to the overlapping regions, so many apart at a time that none overlap."""
        part = regions[:, :, chunk].permute(0, 2, 3, 1, 4, 5)
        values = values.view(part.shape)
        every_y = -(-self.rows.region // (self.rows.tile * self.rows.step))
        every_x = -(-self.cols.region // (self.cols.tile * self.cols.step))
        for y in range(every_y):
            for x in range(every_x):
                part[:, y::every_y, x::every_x] += values[:, y::every_y, x::every_x]

    def inside(self, maps: Tensor, phase: tuple[int, int], chunk: slice) -> Tensor:
        """Bool (T, queries of a tile, keys of a region): is the key in the query's neighbourhood?

        Where a tile overhangs the map of queries, ``maps``, none is. Unless careful, that makes no
        difference, and T is left out.
        """
        if not self.careful:
            return self.neighbours
        tiles = self.tiles(torch.ones_like(maps[:, :, :1]), phase)
        return (self.gather_queries(tiles, chunk).mT > 0) & self.neighbours

    def zero_outside_(self, pairs: Tensor, inside: Tensor) -> Tensor:
        """What may be 0 * NaN where ``pairs`` (of queries and keys) are outside, as 0."""
        return pairs.masked_fill_(~inside, 0) if self.careful else pairs

    def weights(self, query: Tensor, key: Tensor, scale: float, inside: Tensor) -> Tensor:
        """Attention weights (T, queries of a tile, keys of a region)."""
        if not self.careful:
            return torch.baddbmm(self.mask, query.mT, key, alpha=scale).softmax(-1)
        logits = torch.bmm(query.mT, key).mul_(scale).masked_fill_(~inside, -math.inf)
        return self.zero_outside_(logits.softmax(-1), inside)

    def grad_logits_(
        self, grad_weights: Tensor, weights: Tensor, scale: float, inside: Tensor
    ) -> Tensor:
        """Softmax's gradient, w * (dw - sum(w * dw)), times ``scale``, in place."""
        result = self.zero_outside_(grad_weights.mul_(weights), inside)
        total = result.sum(-1, keepdim=True)
        return self.zero_outside_(result.addcmul_(weights, total, value=-1).mul_(scale), inside)

    def product(self, maps: Tensor, pairs: Tensor, inside: Tensor) -> Tensor:
        """Matrix product (T, d, m) x (T, m, n), of which sums take only what is ``inside``."""
        if not self.careful:
            return torch.bmm(maps, pairs)
        odd = ~maps.isfinite()
        reached = torch.bmm(odd.to(maps.dtype), inside.to(maps.dtype)) > 0
        return torch.bmm(maps.masked_fill(odd, 0), pairs).masked_fill_(reached, math.nan)


def _fast_or_careful(compute: Callable[..., list[Tensor]], *arguments) -> list[Tensor]:
    """``compute(*arguments, careful)``, carefully where the fast way gives a NaN or infinity.

    One sum that is finite says that there is none, and takes one synchronisation on a GPU. While
    a CUDA graph is being captured nothing can be asked.
    """
    if not (arguments[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        results = compute(*arguments, careful=False)
        dtype = torch.promote_types(results[0].dtype, torch.float32)
        if math.isfinite(sum(result.sum(dtype=dtype) for result in results)):
            return results
    return compute(*arguments, careful=True)


@torch.library.custom_op('acmix_mm::local_attention_torch', mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> Tensor:
    return _fast_or_careful(_attend, query, key, value, kernel_size, stride, dilation, scale)[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
    careful: bool,
) -> list[Tensor]:
    plan = _Plan(query, key, kernel_size, stride, dilation, careful)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    with torch.autocast(query.device.type, enabled=False):
        for batch in plan.batches(query.size(0)):
            padded_key, padded_value = plan.pad(key[batch]), plan.pad(value[batch])
            for phase in plan.phases():
                query_tiles = plan.tiles(query[batch], phase)
                output_tiles = torch.empty_like(query_tiles, memory_format=torch.contiguous_format)
                keys = plan.regions(padded_key, phase)
                values = plan.regions(padded_value, phase)
                for chunk in plan.chunks(phase):
                    inside = plan.inside(query[batch], phase, chunk)
                    q = plan.gather_queries(query_tiles, chunk)
                    weights = plan.weights(q, plan.gather_keys(keys, chunk), scale, inside)
                    v = plan.gather_keys(values, chunk)
                    plan.scatter_queries(
                        output_tiles, chunk, plan.product(v, weights.mT, inside.mT)
                    )
                plan.write(output[batch], output_tiles, phase)
    return [output]


@_forward.register_fake
def _(query, key, value, kernel_size, stride, dilation, scale):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op('acmix_mm::local_attention_torch_backward', mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
    needed: list[bool],
) -> list[Tensor]:
    """Those gradients of query, key and value that are ``needed``."""
    geometry = (kernel_size, stride, dilation, scale)
    return _fast_or_careful(_differentiate, grad, query, key, value, *geometry, needed)


def _differentiate(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
    needed: list[bool],
    careful: bool,
) -> list[Tensor]:
    plan = _Plan(query, key, kernel_size, stride, dilation, careful)
    need_query, need_key, need_value = needed
    contiguous = torch.contiguous_format
    grad_query, grad_key, grad_value = (
        torch.empty_like(t, memory_format=contiguous) if need else None
        for t, need in zip((query, key, value), needed, strict=True)
    )
    with torch.autocast(query.device.type, enabled=False):
        for batch in plan.batches(query.size(0)):
            padded_key, padded_value = plan.pad(key[batch]), plan.pad(value[batch])
            padded_grad_key = torch.zeros_like(padded_key) if need_key else None
            padded_grad_value = torch.zeros_like(padded_value) if need_value else None
            for phase in plan.phases():
                query_tiles = plan.tiles(query[batch], phase)
                grad_tiles = plan.tiles(grad[batch], phase)
                if need_key:
                    grad_keys = plan.regions(padded_grad_key, phase)
                if need_value:
                    grad_values = plan.regions(padded_grad_value, phase)
                if need_query:
                    grad_query_tiles = torch.empty_like(query_tiles, memory_format=contiguous)
                keys = plan.regions(padded_key, phase)
                values = plan.regions(padded_value, phase)
                for chunk in plan.chunks(phase):
                    inside = plan.inside(query[batch], phase, chunk)
                    q = plan.gather_queries(query_tiles, chunk)
                    k = plan.gather_keys(keys, chunk)
                    g = plan.gather_queries(grad_tiles, chunk)
                    weights = plan.weights(q, k, scale, inside)
                    if need_value:
                        plan.add_keys_(grad_values, chunk, plan.product(g, weights, inside))
                    if not (need_query or need_key):
                        continue
                    grad_weights = torch.bmm(g.mT, plan.gather_keys(values, chunk))
                    grad_logits = plan.grad_logits_(grad_weights, weights, scale, inside)
                    if need_key:
                        plan.add_keys_(grad_keys, chunk, plan.product(q, grad_logits, inside))
                    if need_query:
                        plan.scatter_queries(
                            grad_query_tiles, chunk, plan.product(k, grad_logits.mT, inside.mT)
                        )
                if need_query:
                    plan.write(grad_query[batch], grad_query_tiles, phase)
            for target, padded in (
                (grad_key, padded_grad_key),
                (grad_value, padded_grad_value),
            ):
                if target is not None:
                    maps = plan.cols.unpad_(plan.rows.unpad_(padded, 2), 3)
                    target[batch].copy_(maps.unflatten(0, target[batch].shape[:2]))
    return [t for t in (grad_query, grad_key, grad_value) if t is not None]


@_backward.register_fake
def _(grad, query, key, value, kernel_size, stride, dilation, scale, needed):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((query, key, value), needed, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[3:]


def _autograd_backward(ctx, grad):
    needed = ctx.needs_input_grad[:3]
    gradients = _backward(grad, *ctx.saved_tensors, *ctx.geometry, needed)
    return *spread(gradients, needed), None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_order('acmix_mm::local_attention_torch_backward', 'local_attention', 'torch')


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """Arguments, already checked, and result as in :func:`acmix_mm.ops.local_attention`.

    Memory beyond inputs and output: one chunk of tiles (:data:`CHUNK_BYTES`, or one row of tiles
    of one sample where that is more), and padded copies of key and value of the samples in work
    (one, unless several fit a chunk); the backward pass adds the gradients of those copies. For
    half precision these are float32. Under transforms of torch.func it is one of
    :func:`unrolled_local_attention`.
    """
    if transformed():
        return unrolled_local_attention(query, key, value, kernel_size, stride, dilation, scale)
    return _forward(query, key, value, kernel_size, stride, dilation, scale)
