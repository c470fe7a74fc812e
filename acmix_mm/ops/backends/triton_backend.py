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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .._autograd import refuse_second_order, spread
from .._checks import check_attention, check_dtypes, check_shape, check_tensors

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
    from .triton_kernels import forward_kernel, grad_key_value_kernel, grad_query_kernel

    # Whatever the size, the interpreter takes its time for operations.
    INTERPRETED_TILE = (8, 16, 256, 4)

    if INTERPRETED or not hasattr(torch.library, 'triton_op'):
        # Interpreted kernels are functions of NumPy arrays, which no graph can hold: tests run the
        # same functions and kernels as opaque operators. PyTorch before 2.6 knows no others.
        from torch.library import custom_op as make_operator

        def wrap_triton(kernel):
            return kernel
    else:
        from torch.library import triton_op as make_operator
        from torch.library import wrap_triton

    def on_device(tensor: Tensor) -> AbstractContextManager:
        """Where a kernel is to be launched for ``tensor``."""
        return nullcontext() if is_fake(tensor) else torch.cuda.device_of(tensor)

    def address(tensor: Tensor) -> int:
        """Of the first number, in bytes, for what it is a multiple of."""
        # What a compiled graph allocates is aligned, and what it is given, as when traced.
        fake = is_fake(tensor)
        return tensor.storage_offset() * tensor.element_size() if fake else tensor.data_ptr()

    def _operator(name: str, fake: Callable) -> Callable:
        """A custom operator, into which torch.compile sees, with ``fake`` for shapes alone."""

        def register(function: Callable) -> Callable:
            operator = make_operator(name, function, mutates_args=())
            # triton_op takes the function, whose decisions would become conditions of an export.
            operator.register_fake(fake)
            return operator

        return register

    def _tunes() -> bool:
        return AUTOTUNE and not torch.are_deterministic_algorithms_enabled()

    def _candidates(kernel):
        """``kernel`` with all tiles of the table as candidates, where it is to be tuned."""
        return _tuned(kernel) if _tunes() else kernel

    @functools.cache
    def _tuned(kernel):
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

        tile = {}
        if not _tunes():
            kind = constants['PRECISION'] if query.element_size() == 4 else 'half'
            tile = INTERPRETED_TILE if INTERPRETED else kernels.TILES[kind, constants['DIM_BLOCK']]
            config = _config(*tile)
            # Not all_kwargs(), with num_ctas, which graphs do not take.
            tile = {**config.kwargs, 'num_warps': config.num_warps, 'num_stages': config.num_stages}
        with on_device(query):
            for careful in (False, True):
                kernel[grid](*args, **constants, CAREFUL=careful, **tile)

    def _channels_last(maps: Tensor) -> Tensor:
        """(B, N, d, H, W) with adjacent channels of a head; a copy unless they are."""
        if maps.stride(2) == 1 or maps.size(2) == 1:
            return maps
        return _empty(maps).copy_(maps)

    def _empty(maps: Tensor) -> Tensor:
        """A new tensor of that shape (B, N, d, H, W), in memory (B, H, W, N, d)."""
        batch, heads, dim, height, width = maps.shape
        return maps.new_empty((batch, height, width, heads, dim)).permute(0, 3, 4, 1, 2)

    def _strides(*tensors: Tensor | None) -> list[int]:
        """Of each but that of channels, which is 1."""
        strides = [(0,) * 5 if t is None else t.stride() for t in tensors]
        return [step for steps in strides for i, step in enumerate(steps) if i != 2]

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
            self.heads, dim = query.shape[1:3]
            self.size = tuple(key.shape[3:])
            self.query_size = tuple(query.shape[3:])
            # Steps beyond the map have shorter ones that reach the same pixels, and in the kernels
            # positions of 32 bits. Reflection is periodic, and one query takes no strides.
            if any(kernel_size // 2 * dilation >= n for n in self.size):
                period = math.lcm(*(max(2 * n - 2, 1) for n in self.size))
                dilation = (dilation - 1) % period + 1
            if self.query_size == (1, 1):
                stride = 1
            unit = math.gcd(stride, dilation)
            step, self.phases = stride // unit, dilation // unit
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

        def accesses(self, *tensors: Tensor | None) -> dict[str, bool]:
            """WIDE and ALIGNED of the kernels, for maps that they read or write."""
            spans, aligned = [], True
            for t in tensors:
                if t is None:
                    continue
                strides = t.stride()
                spans.append(
                    sum((n - 1) * s for n, s in zip(t.shape[2:], strides[2:], strict=True))
                )
                # A stride along an axis of length 1 may be anything, and does not matter.
                steps = [s for i, s in enumerate(strides) if i != 2 and t.size(i) > 1]
                aligned &= all(step * t.element_size() % 16 == 0 for step in steps)
                aligned &= address(t) % 16 == 0
            return {'WIDE': bool(max(spans) >= 2**31), 'ALIGNED': bool(aligned)}

        def images(self, axis: int) -> tuple[int, int]:
            """Range of the i whose mirror images of pixels a neighbourhood may reach.

            Those of pixel p are at ``period * (i / 2) + p`` and, i odd, ``period * ((i - 1) / 2) -
            p``.
            """
            size = self.size[axis]
            period = max(2 * size - 2, 1)
            first = -((self.reach + size - 1) // period)
            return 2 * first, 2 * ((self.last[axis] + size - 1) // period) + 2

    def _empty_outputs(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor | None,
        convolution: Tensor | None,
        factor: Tensor | None,
        kernel_size: int,
        stride: int,
        dilation: int,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse = (*query.shape[:2], *query.shape[3:]) if keep else (0,)
        kept = keep and convolution is not None
        attention = _empty(query) if kept else query.new_empty((0,))
        return _empty(query), attention, query.new_empty(lse, dtype=torch.float32)

    @_operator('acmix_mm::local_attention_triton_forward', _empty_outputs)
    def _forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor | None,
        convolution: Tensor | None,
        factor: Tensor | None,
        kernel_size: int,
        stride: int,
        dilation: int,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments as of :func:`mixed_attention`, but that convolution and factor may be None.

        Returns:
            tuple[Tensor, Tensor, Tensor]: The result; where there is a convolution, attention
            alone; log2 of the sum of 2 ** (logits * log2(e)), a number a query and head. The two
            latter have numbers only if they are to be kept, for the backward pass.
        """
        _check(query, key, value, slopes, factor, kernel_size, stride, dilation)
        if (convolution is None) != (factor is None):
            raise ValueError('convolution and factor come together')
        if convolution is not None:
            _check_like('convolution', convolution, query)
        output, attention, lse = _empty_outputs(
            query, key, value, slopes, convolution, factor,
            kernel_size, stride, dilation, scale, keep,
        )  # fmt: skip
        if query.numel() == 0:
            return output, attention, lse
        query, key, value = map(_channels_last, (query, key, value))
        step = 0
        if convolution is not None:
            convolution = _channels_last(convolution)
            step = factor.stride(0) if factor.numel() > 1 else 0
        maps = (query, key, value, output, convolution)
        plan = _Geometry(query, key, kernel_size, stride, dilation)
        # From these names PyTorch knows, for its caches of graphs, of which kernels an operator is.
        kernel = _candidates(forward_kernel)
        _launch(
            wrap_triton(kernel),
            query,
            plan.query_size,
            plan.phases,
            *(query, key, value, _contiguous(slopes), convolution, factor, output),
            *(attention if attention.numel() else None, lse if keep else None),
            *_strides(*maps),
            *(step, plan.heads, *plan.size, *plan.query_size, scale),
            **plan.constants,
            **plan.accesses(*maps),
            ONCE=plan.once,
        )
        return output, attention, lse

    def _contiguous(slopes: Tensor | None) -> Tensor | None:
        return None if slopes is None else slopes.contiguous()

    def _check(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor | None,
        factor: Tensor | None,
        kernel_size: int,
        stride: int,
        dilation: int,
    ) -> None:
        """Calls without the front's checks, too: kernels take sizes and strides at their word."""
        check_attention(query, key, value, kernel_size, stride, dilation)
        check_dtypes(query=query, key=key, value=value)
        heads, dim = query.shape[1:3]
        why = f'query of shape {tuple(query.shape)}'
        if slopes is not None:
            check_tensors(query=query, slopes=slopes)
            check_shape('slopes', slopes, (dim, 2), why)
        if factor is not None:
            check_tensors(query=query, factor=factor)
            check_shape('factor', factor, (1,) if factor.numel() == 1 else (heads * dim,), why)

    def _check_like(name: str, tensor: Tensor, query: Tensor) -> None:
        check_tensors(**{'query': query, name: tensor})
        check_dtypes(**{'query': query, name: tensor})
        check_shape(name, tensor, tuple(query.shape), f'query of shape {tuple(query.shape)}')

    def _empty_gradients(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor | None,
        factor: Tensor | None,
        attention: Tensor,
        lse: Tensor,
        kernel_size: int,
        stride: int,
        dilation: int,
        scale: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        maps = [_empty(t) for t, need in zip((query, key, value), needed, strict=False) if need]
        rest = zip((slopes, factor), needed[3:], strict=True)
        return maps + [t.new_empty(t.shape) for t, need in rest if need]

    @_operator('acmix_mm::local_attention_triton_backward', _empty_gradients)
    def _backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor | None,
        factor: Tensor | None,
        attention: Tensor,
        lse: Tensor,
        kernel_size: int,
        stride: int,
        dilation: int,
        scale: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """Those gradients of query, key, value, slopes and factor that are ``needed``."""
        _check(query, key, value, slopes, factor, kernel_size, stride, dilation)
        _check_like('grad', grad, query)
        _check_like('attention', attention, query)
        shape = (*query.shape[:2], *query.shape[3:])
        check_shape('lse', lse, shape, f'query of shape {tuple(query.shape)}')
        of_query, of_key, of_value, of_slopes, of_factor = needed
        grad_factor = None
        if factor is not None and factor.numel() > 1:
            # Rare: a deployed layer that is trained on.
            products = grad.float() * attention.float()
            grad_factor = products.sum((0, 3, 4)).flatten().to(factor.dtype)
            grad = (grad * factor.view(1, *grad.shape[1:3], 1, 1)).to(grad.dtype)
            factor, of_factor = None, False
        # Of the position encoding, the gradient is summed up from that of key.
        of_keys = of_key or of_slopes
        grad_query, grad_key, grad_value = (
            _empty(t) if need else None
            for t, need in ((query, of_query), (key, of_keys), (value, of_value))
        )
        query, key, value, grad, attention = map(
            _channels_last, (query, key, value, grad, attention)
        )
        plan = _Geometry(query, key, kernel_size, stride, dilation)
        slopes_given, slopes = slopes, _contiguous(slopes)
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        tilts = None if slopes is None else lse.new_empty((2, *lse.shape))
        if of_query and query.numel():
            maps = (query, key, value, attention, grad, grad_query)
            kernel = _candidates(grad_query_kernel)
            _launch(
                wrap_triton(kernel),
                query,
                plan.query_size,
                plan.phases,
                *(query, key, value, slopes, factor, attention, lse),
                *(grad, grad_query, delta, tilts),
                *_strides(*maps),
                *(plan.heads, *plan.size, *plan.query_size, lse.numel(), scale),
                **plan.constants,
                **plan.accesses(*maps),
                ONCE=plan.once,
            )
        else:
            delta = (grad.float() * attention.float()).sum(2)
            if slopes is not None:
                columns = slopes.float().T[:, None, None, :, None, None]
                tilts = (query.float() * columns).sum(3)
        if (of_keys or of_value) and query.numel():
            maps = (query, key, value, grad, grad_key if of_keys else grad_value)
            kernel = _candidates(grad_key_value_kernel)
            _launch(
                wrap_triton(kernel),
                query,
                plan.size,
                plan.dilation,
                *(query, key, value, factor, lse, delta, tilts, grad, grad_key, grad_value),
                *_strides(*maps),
                *(plan.heads, *plan.size, *plan.query_size),
                *(*plan.images(0), *plan.images(1), lse.numel(), scale),
                **plan.constants,
                **plan.accesses(*maps),
                INVERSE=plan.inverse,
            )
        grad_slopes = _grad_slopes(grad_key).to(slopes_given.dtype) if of_slopes else None
        if of_factor:
            grad_factor = delta.sum().view(1).to(factor.dtype)
        gradients = (grad_query, grad_key, grad_value, grad_slopes, grad_factor)
        return [g for g, need in zip(gradients, needed, strict=True) if need]

    def _grad_slopes(grad_key: Tensor) -> Tensor:
        """Gradient (d, 2) of the position encoding, which is taken off all keys."""
        maps = grad_key.sum((0, 1), dtype=torch.float32)
        height, width = maps.shape[1:]
        # Not linspace, which would tie a compiled graph to one size.
        x, y = (
            torch.arange(n, dtype=maps.dtype, device=maps.device) * (2 / max(n - 1, 1)) - 1
            for n in (width, height)
        )
        return -torch.stack([(maps.sum(1) * x).sum(1), (maps.sum(2) * y).sum(1)], 1)

    def _setup_context(ctx, inputs, output):
        *tensors, convolution, factor = inputs[:6]
        result, attention, lse = output
        kept = result if convolution is None else attention
        ctx.save_for_backward(*tensors, factor, kept, lse)
        ctx.geometry = inputs[6:10]

    def _autograd_backward(ctx, grad, *others):
        *needed, of_convolution, of_factor = ctx.needs_input_grad[:6]
        needed.append(of_factor)
        gradients = [None] * 5
        if any(needed):
            computed = _backward(grad, *ctx.saved_tensors, *ctx.geometry, needed)
            gradients = spread(computed, needed)
        of_convolution = grad if of_convolution else None
        return *gradients[:4], of_convolution, gradients[4], None, None, None, None, None

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
    memory beyond its results and few numbers a query and head. Each gradient is summed by the one
    program that writes it, in float32, over the mirror images of its pixel too, so the order of
    additions is fixed.
    """
    keep = _differentiates(query, key, value)
    geometry = (kernel_size, stride, dilation, scale)
    return _forward(query, key, value, None, None, None, *geometry, keep)[0]


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    convolution: Tensor,
    factor: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """``factor * attention + convolution``, for keys less a position encoding.

    As :func:`local_attention`; neither the keys less their encoding nor, unless the backward pass
    needs it, the result of attention become maps in memory.

    Args:
        query (Tensor): Shape (B, N, d, ceil(H / stride), ceil(W / stride)).
        key (Tensor): Shape (B, N, d, H, W), dtype and device of ``query``.
        value (Tensor): As ``key``.
        slopes (Tensor): Shape (d, 2): the encoding is ``slopes @ (x, y)`` for coordinates
            linspace(-1, 1) over width and height. Any floating-point dtype.
        convolution (Tensor): As ``query``.
        factor (Tensor): Shape (1,) or (N * d,). Any floating-point dtype.
        kernel_size (int): Side of the neighbourhood, odd.
        stride (int): Keys between the neighbourhoods of adjacent queries.
        dilation (int): Distance between the keys of a neighbourhood.

    Returns:
        Tensor: As ``query``, (B, H, W, N, d) in memory.
    """
    tensors = (query, key, value, slopes, convolution, factor)
    geometry = (kernel_size, stride, dilation, query.size(2) ** -0.5)
    return _forward(*tensors, *geometry, _differentiates(*tensors))[0]


def _differentiates(*tensors: Tensor) -> bool:
    """May there be a backward pass?"""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
