"""Neighbourhood attention in Triton for GPUs: float32, bfloat16 and float16.

Each program takes a small tile of queries through the keys of their joint neighbourhood with an
online softmax, as flash attention does, and masks what lies outside each query's own. Borders are
reflected when addresses are formed, so nothing is padded. Channels of a head are adjacent in
memory, as in the channels-last layout of a map whose channels are ordered by head; inputs of other
layouts are copied.

Products in float32 use TF32 where :mod:`torch.backends.cudnn` allows it for convolutions, as is
PyTorch's default.

A table has the shape of tiles by dtype and head dimension. With ``ACMIX_MM_AUTOTUNE=1`` in the
environment when this package is imported, all shapes of the table are measured instead, at the
first call with a head dimension, dtype, kernel size and stride, which takes some seconds;
``TRITON_CACHE_AUTOTUNING=1`` keeps the outcome on disk. For a given shape, results are the same
each time, but another shape rounds differently, so :func:`torch.use_deterministic_algorithms` keeps
to the table.

With ``TRITON_INTERPRET=1`` in the environment when this package is imported, the same kernels run
in Triton's interpreter, on CPU tensors too: very slow, for tests.
"""

import functools
import importlib.util
import math
import os

import torch
from torch import Tensor

from .._autograd import refuse_second_order, spread
from .._checks import check_attention, check_dtypes, check_shape

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REQUIREMENT = (
    'float16, bfloat16 or float32, a head dimension of at most '
    f'{MAX_HEAD_DIM} and a GPU of compute capability 8.0 or higher'
)

# Asked before importing Triton, which takes a while, and for nothing without a GPU.
INTERPRETED = os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')
AUTOTUNE = os.environ.get('ACMIX_MM_AUTOTUNE', '') not in ('', '0')
if importlib.util.find_spec('triton') is None:
    MISSING = 'Triton is not installed'
elif not INTERPRETED and not torch.cuda.is_available():
    MISSING = 'there is no GPU'
else:
    MISSING = None


def refuses(tensor: Tensor, *args, head_dim: int | None = None) -> str | None:
    """What the backend needs of a query, where it is otherwise: see REQUIREMENT.

    Args:
        tensor (Tensor): The query, or another tensor of its dtype and device.
        *args: Not looked at.
        head_dim (int | None): Default: None, for that of a query, (B, N, d, Hq, Wq).
    """
    head_dim = tensor.size(2) if head_dim is None else head_dim
    takes = tensor.dtype in DTYPES and head_dim <= MAX_HEAD_DIM
    if takes and not INTERPRETED:
        # Below 8.0 Triton cannot generate code. AMD's numbers are all above.
        device = tensor.device
        takes = device.type == 'cuda' and torch.cuda.get_device_properties(device).major >= 8
    if takes:
        return None
    return f'{REQUIREMENT}, got a head dimension of {head_dim}, {tensor.dtype} and {tensor.device}'


def refuses_tensor(tensor: Tensor, *args) -> str | None:
    """The same of operators without heads: see :mod:`.triton_group_conv`."""
    if refuses(tensor, head_dim=1) is None:
        return None
    return (
        'float16, bfloat16 or float32 and a GPU of compute capability 8.0 or higher, got '
        f'{tensor.dtype} and {tensor.device}'
    )


if MISSING is None:
    import triton

    from . import triton_kernels as kernels

    # Whatever the size, the interpreter takes its time for operations.
    INTERPRETED_TILE = (8, 16, 256, 4)

    @functools.cache
    def _tuned(kernel):
        """``kernel`` with all tiles of the table as candidates."""
        configs = [_config(*tile) for tile in sorted({*kernels.TILES.values()})]
        return triton.autotune(configs, ['DIM', 'KERNEL_SIZE', 'STEP', 'PRECISION'])(kernel)

    def _config(tile_y: int, tile_x: int, block: int, warps: int) -> triton.Config:
        tile = {'TILE_Y': tile_y, 'TILE_X': tile_x, 'BLOCK': block}
        return triton.Config(tile, num_warps=warps, num_stages=2)

    def _launch(
        kernel, query: Tensor, size: tuple[int, int], classes: int, *args, **constants
    ) -> None:
        """A program for each head and tile of each class of pixels modulo ``classes`` of an area.

        Then the same again, carefully, for what turned out not to be finite.
        """
        present = math.prod(min(n, classes) for n in size)

        def grid(meta):
            tiles_y, tiles_x = (
                triton.cdiv(triton.cdiv(n, classes), meta[tile])
                for n, tile in zip(size, ('TILE_Y', 'TILE_X'), strict=True)
            )
            return (query.size(0) * query.size(1) * present * tiles_y * tiles_x,)

        kind = constants['PRECISION'] if query.element_size() == 4 else 'half'
        tile = kernels.TILES[kind, constants['DIM_BLOCK']]
        tile = _config(*(INTERPRETED_TILE if INTERPRETED else tile)).all_kwargs()
        if AUTOTUNE and not torch.are_deterministic_algorithms_enabled():
            _tuned(kernel)[grid](*args, **constants, CAREFUL=False)
        else:
            kernel[grid](*args, **constants, CAREFUL=False, **tile)
        kernel[grid](*args, **constants, CAREFUL=True, **tile)

    def _channels_last(maps: Tensor) -> Tensor:
        """(B, N, d, H, W) with adjacent channels of a head; a copy unless they are."""
        if maps.stride(2) == 1 or maps.size(2) == 1:
            return maps
        return _empty(maps).copy_(maps)

    def _empty(maps: Tensor) -> Tensor:
        """A new tensor of that shape (B, N, d, H, W), in memory (B, H, W, N, d)."""
        batch, heads, dim, height, width = maps.shape
        return maps.new_empty((batch, height, width, heads, dim)).permute(0, 3, 4, 1, 2)

    def _strides(*tensors: Tensor) -> list[int]:
        """Of each but that of channels, which is 1."""
        return [s for t in tensors for i, s in enumerate(t.stride()) if i != 2]

    def _precision(dtype: torch.dtype) -> str:
        """Of factors of products: in float32, TF32 if PyTorch allows it for convolutions."""
        cudnn = torch.backends.cudnn
        if dtype != torch.float32 or torch.version.hip is not None:
            return 'ieee'
        if hasattr(cudnn, 'conv'):  # PyTorch 2.9 and later
            return 'tf32' if cudnn.conv.fp32_precision == 'tf32' else 'ieee'
        return 'tf32' if cudnn.allow_tf32 else 'ieee'

    class _Geometry:
        """The lattice of a call, as :mod:`.triton_kernels` describes it, and what follows."""

        def __init__(
            self, query: Tensor, key: Tensor, kernel_size: int, stride: int, dilation: int
        ):
            unit = math.gcd(stride, dilation)
            step, self.phases = stride // unit, dilation // unit
            self.heads, dim = query.shape[1:3]
            self.size = tuple(key.shape[3:])
            self.query_size = tuple(query.shape[3:])
            self.dilation = dilation
            # How far from a query its neighbourhood reaches.
            self.reach = kernel_size // 2 * dilation
            # The last pixel that any does.
            self.last = [stride * (n - 1) + self.reach for n in self.query_size]
            self.once = all(n == 1 or self.reach < n for n in self.size)
            self.inverse = pow(step, -1, self.phases)
            self.constants = {
                'DIM': dim,
                'DIM_BLOCK': max(16, triton.next_power_of_2(dim)),
                'KERNEL_SIZE': kernel_size,
                'STEP': step,
                'PHASES': self.phases,
                'UNIT': unit,
                'PRECISION': _precision(query.dtype),
            }

        def accesses(self, *tensors: Tensor) -> dict[str, bool]:
            """WIDE and ALIGNED of the kernels, for maps that they read or write."""
            spans, aligned = [], True
            for t in tensors:
                strides = t.stride()
                spans.append(
                    sum((n - 1) * s for n, s in zip(t.shape[2:], strides[2:], strict=True))
                )
                # A stride along an axis of length 1 may be anything, and does not matter.
                steps = [s for i, s in enumerate(strides) if i != 2 and t.size(i) > 1]
                aligned &= all(step * t.element_size() % 16 == 0 for step in steps)
                aligned &= t.data_ptr() % 16 == 0
            return {'WIDE': max(spans) >= 2**31, 'ALIGNED': aligned}

        def images(self, axis: int) -> tuple[int, int]:
            """Range of the i whose mirror images of pixels a neighbourhood may reach.

            Those of pixel p are at ``period * (i / 2) + p`` and, i odd, ``period * ((i - 1) / 2) -
            p``.
            """
            size = self.size[axis]
            period = max(2 * size - 2, 1)
            first = -((self.reach + size - 1) // period)
            return 2 * first, 2 * ((self.last[axis] + size - 1) // period) + 2

    @torch.library.custom_op('acmix_mm::local_attention_triton_forward', mutates_args=())
    def _forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int,
        stride: int,
        dilation: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        # Also of a call without the front's checks: kernels take sizes and strides at their word.
        check_attention(query, key, value, kernel_size, stride, dilation)
        check_dtypes(query=query, key=key, value=value)
        output, lse = _empty_outputs(query)
        if query.numel() == 0:
            return output, lse
        query, key, value = map(_channels_last, (query, key, value))
        maps = (query, key, value, output)
        plan = _Geometry(query, key, kernel_size, stride, dilation)
        with torch.cuda.device_of(query):
            _launch(
                kernels.forward_kernel,
                query,
                plan.query_size,
                plan.phases,
                *(*maps, lse),
                *_strides(*maps),
                *(plan.heads, *plan.size, *plan.query_size, scale),
                **plan.constants,
                **plan.accesses(*maps),
                ONCE=plan.once,
            )
        return output, lse

    def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and log2 of the sum of 2 ** (logits * log2(e)), a number a query and head."""
        shape = (*query.shape[:2], *query.shape[3:])
        return _empty(query), query.new_empty(shape, dtype=torch.float32)

    @_forward.register_fake
    def _(query, key, value, kernel_size, stride, dilation, scale):
        return _empty_outputs(query)

    @torch.library.custom_op('acmix_mm::local_attention_triton_backward', mutates_args=())
    def _backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        kernel_size: int,
        stride: int,
        dilation: int,
        scale: float,
        needed: list[bool],
    ) -> list[Tensor]:
        """Those gradients of query, key and value that are ``needed``."""
        check_attention(query, key, value, kernel_size, stride, dilation)
        check_dtypes(query=query, key=key, value=value, grad=grad, output=output)
        why = f'query of shape {tuple(query.shape)}'
        check_shape('grad', grad, tuple(query.shape), why)
        check_shape('output', output, tuple(query.shape), why)
        check_shape('lse', lse, (*query.shape[:2], *query.shape[3:]), why)
        gradients = _empty_gradients((query, key, value), needed)
        if query.numel() == 0:
            return gradients
        grad_query, grad_key, grad_value = spread(gradients, needed)
        query, key, value, grad, output = map(_channels_last, (query, key, value, grad, output))
        plan = _Geometry(query, key, kernel_size, stride, dilation)
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        need_query, need_key, need_value = needed
        with torch.cuda.device_of(query):
            if need_query:
                maps = (query, key, value, output, grad)
                _launch(
                    kernels.grad_query_kernel,
                    query,
                    plan.query_size,
                    plan.phases,
                    *(query, key, value, output, lse, grad, grad_query, delta),
                    *_strides(*maps, grad_query),
                    *(plan.heads, *plan.size, *plan.query_size, scale),
                    **plan.constants,
                    **plan.accesses(*maps, grad_query),
                    ONCE=plan.once,
                )
            elif need_key:
                torch.sum(grad.float() * output.float(), 2, out=delta)
            if need_key or need_value:
                maps = (query, key, value, grad, grad_key if need_key else grad_value)
                _launch(
                    kernels.grad_key_value_kernel,
                    query,
                    plan.size,
                    plan.dilation,
                    *(query, key, value, lse, delta, grad, grad_key, grad_value),
                    *_strides(*maps),
                    *(plan.heads, *plan.size, *plan.query_size),
                    *(*plan.images(0), *plan.images(1), scale),
                    **plan.constants,
                    **plan.accesses(*maps),
                    INVERSE=plan.inverse,
                )
        return gradients

    def _empty_gradients(tensors: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor]:
        return [_empty(t) for t, need in zip(tensors, needed, strict=True) if need]

    @_backward.register_fake
    def _(grad, query, key, value, output, lse, kernel_size, stride, dilation, scale, needed):
        return _empty_gradients((query, key, value), needed)

    def _setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.geometry = inputs[3:]

    def _autograd_backward(ctx, grad, grad_lse):
        needed = ctx.needs_input_grad[:3]
        gradients = _backward(grad, *ctx.saved_tensors, *ctx.geometry, needed)
        return *spread(gradients, needed), None, None, None, None

    _forward.register_autograd(_autograd_backward, setup_context=_setup_context)
    refuse_second_order('acmix_mm::local_attention_triton_backward', 'local_attention', 'triton')


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

    Inputs whose channels are not adjacent in memory are copied; results are (B, H, W, N, d) in
    memory. Training keeps inputs, output and one log-sum-exp a query and head. Neither pass needs
    memory beyond its results and one number a query and head. Each gradient is summed by the one
    program that writes it, in float32, over the mirror images of its pixel too, so the order of
    additions is fixed.
    """
    return _forward(query, key, value, kernel_size, stride, dilation, scale)[0]
