"""Neighbourhood attention in Triton for GPUs: float32, bfloat16 and float16.

Each program takes a small tile of queries through the keys of their joint neighbourhood with an
online softmax, as flash attention does, and masks what lies outside each query's own. Borders are
reflected when addresses are formed, so inputs are neither padded nor copied, whatever their
strides.

Tile shapes are tuned at the first call with a head dimension, dtype, kernel size and stride, which
takes some seconds; ``TRITON_CACHE_AUTOTUNING=1`` keeps the outcome on disk. For a given shape,
results are the same each time, but another shape rounds differently, so
:func:`torch.use_deterministic_algorithms` fixes one instead of tuning.

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


if MISSING is None:
    import triton

    from . import triton_kernels as kernels

    @functools.cache
    def _tuned(kernel, dim_block: int, itemsize: int):
        """``kernel`` with its candidates for heads of that size."""
        shapes = kernels.tile_shapes(dim_block, itemsize)
        if INTERPRETED:
            shapes = [(8, 16, 256, 4)]  # the time goes into operations, whatever their size
        configs = [
            triton.Config({'TILE_Y': y, 'TILE_X': x, 'BLOCK': block}, num_warps=warps, num_stages=2)
            for y, x, block, warps in shapes
        ]
        return triton.autotune(configs, ['DIM', 'KERNEL_SIZE', 'STEP'])(kernel)  # and dtypes

    def _launch(kernel, query: Tensor, height: int, width: int, *args, **constants) -> None:
        """A program for each head, phase and tile of an area of ``height`` x ``width``.

        Then the same again, carefully, for what turned out not to be finite.
        """
        tuned = _tuned(kernel, constants['DIM_BLOCK'], query.element_size())
        programs = query.size(0) * query.size(1) * constants['PHASES'] ** 2

        def grid(meta):
            tiles_y = triton.cdiv(triton.cdiv(height, meta['PHASES']), meta['TILE_Y'])
            tiles_x = triton.cdiv(triton.cdiv(width, meta['PHASES']), meta['TILE_X'])
            return (programs * tiles_y * tiles_x,)

        untuned = tuned.configs[0].all_kwargs()
        if torch.are_deterministic_algorithms_enabled():
            kernel[grid](*args, **constants, CAREFUL=False, **untuned)
        else:
            tuned[grid](*args, **constants, CAREFUL=False)
        kernel[grid](*args, **constants, CAREFUL=True, **untuned)

    class _Geometry:
        """The lattice of a call, as :mod:`.triton_kernels` describes it, and what follows."""

        def __init__(
            self, query: Tensor, key: Tensor, kernel_size: int, stride: int, dilation: int
        ):
            self.unit = math.gcd(stride, dilation)
            self.step, self.phases = stride // self.unit, dilation // self.unit
            self.before = kernel_size // 2 * dilation
            self.heads, self.dim = query.shape[1:3]
            self.size = tuple(key.shape[3:])
            self.query_size = tuple(query.shape[3:])
            # Lattice points from the first that any neighbourhood touches to the last.
            self.padded_size = tuple(
                self.step * (n - 1) + 2 * self.before // self.unit + 1 for n in self.query_size
            )
            self.constants = {
                'DIM': self.dim,
                'DIM_BLOCK': max(16, triton.next_power_of_2(self.dim)),
                'KERNEL_SIZE': kernel_size,
                'STEP': self.step,
                'PHASES': self.phases,
                'UNIT': self.unit,
                'ONCE': all(n == 1 or self.before < n for n in self.size),
            }

        def wide(self, *tensors: Tensor) -> bool:
            """Do offsets within a head of any of ``tensors``, or of the lattice, exceed 32 bits?"""
            spans = [self.dim * math.prod(self.padded_size)]
            for t in tensors:
                spans.append(
                    sum((n - 1) * s for n, s in zip(t.shape[2:], t.stride()[2:], strict=True))
                )
            return max(spans) >= 2**31

        def images(self, axis: int) -> tuple[int, int]:
            """First and last i for which ``period * i`` +- a pixel can lie on the lattice."""
            size = self.size[axis]
            period = max(2 * size - 2, 1)
            last = (self.padded_size[axis] - 1) * self.unit - self.before
            return -((self.before + size - 1) // period), (last + size - 1) // period

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
        plan = _Geometry(query, key, kernel_size, stride, dilation)
        with torch.cuda.device_of(query):
            _launch(
                kernels.forward_kernel,
                query,
                *plan.query_size,
                *(query, key, value, output, lse),
                *(*query.stride(), *key.stride(), *value.stride()),
                *(plan.heads, *plan.size, *plan.query_size, scale),
                **plan.constants,
                WIDE=plan.wide(query, key, value, output),
            )
        return output, lse

    def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and log2 of the sum of 2 ** (logits * log2(e)), a number a query and head."""
        output = query.new_empty(query.shape)
        shape = (*query.shape[:2], *query.shape[3:])
        return output, query.new_empty(shape, dtype=torch.float32)

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
        gradients = [
            t.new_empty(t.shape)
            for t, need in zip((query, key, value), needed, strict=True)
            if need
        ]
        if query.numel() == 0:
            return gradients
        grad_query, grad_key, grad_value = spread(gradients, needed)
        plan = _Geometry(query, key, kernel_size, stride, dilation)
        strides = (*query.stride(), *key.stride(), *value.stride(), *grad.stride())
        constants = {**plan.constants, 'WIDE': plan.wide(query, key, value, grad, output)}
        need_query, need_key, need_value = needed
        delta = torch.empty_like(lse)
        padded_grad_key, padded_grad_value = (
            lse.new_empty((*key.shape[:3], *plan.padded_size)) if need else None
            for need in needed[1:]
        )
        with torch.cuda.device_of(query):
            if need_query:
                _launch(
                    kernels.grad_query_kernel,
                    query,
                    *plan.query_size,
                    *(query, key, value, output, lse, grad, grad_query, delta),
                    *strides,
                    *(plan.heads, *plan.size, *plan.query_size, scale),
                    **constants,
                )
            elif need_key:
                torch.sum(grad.float() * output.float(), 2, out=delta)
            if not (need_key or need_value):
                return gradients
            _launch(
                kernels.grad_key_value_kernel,
                query,
                *plan.padded_size,
                *(query, key, value, lse, delta, grad, padded_grad_key, padded_grad_value),
                *strides,
                *(plan.heads, *plan.size, *plan.query_size, *plan.padded_size, scale),
                **constants,
            )
            maps = key.shape[:3].numel()
            height, width = plan.size
            tile_x = min(128, max(16, triton.next_power_of_2(width)))
            tile_m = 1024 // tile_x
            grid = (height * triton.cdiv(maps, tile_m) * triton.cdiv(width, tile_x),)
            kernels.fold_kernel[grid](
                *(padded_grad_key, padded_grad_value, grad_key, grad_value),
                *(maps, height, width, *plan.padded_size, *plan.images(0), *plan.images(1)),
                BEFORE=plan.before,
                UNIT=plan.unit,
                TILE_M=tile_m,
                TILE_X=tile_x,
            )
        return gradients

    @_backward.register_fake
    def _(grad, query, key, value, output, lse, kernel_size, stride, dilation, scale, needed):
        return [
            t.new_empty(t.shape)
            for t, need in zip((query, key, value), needed, strict=True)
            if need
        ]

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

    Training keeps inputs, output and one log-sum-exp a query and head. The forward pass needs no
    memory beyond the output. The backward pass sums the gradients of key and value in float32, over
    the map and the border around it that neighbourhoods reach, and then folds the border back onto
    the pixels that it mirrors: no two programs add to the same number, so the order of additions is
    fixed.
    """
    return _forward(query, key, value, kernel_size, stride, dilation, scale)[0]
