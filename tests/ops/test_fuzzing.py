"""Public operators: any shape, layout, dtype and geometry, with every backend, or a clear error."""

import copy
import inspect
import math

import pytest
import torch
from devices import needs_triton
from fuzzing import assert_close, axes, batches, fuzz, fuzzed, make, sizes, steps
from hypothesis import strategies as st
from torch import Tensor, nn

from acmix_mm import ops
from acmix_mm.ops import available_backends
from acmix_mm.ops import reference as oracles

BACKENDS = available_backends()
kernels = st.sampled_from([1, 3, 3, 5, 7, 9])
few = st.integers(1, 3)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def ceil(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return tuple(-(-n // stride) for n in size)


# Each draws tensors and arguments and returns (tensors, operator, oracle): functions of the
# tensors, None among them where an optional one is left out. With a norm, also the oracle's.


def draw_steps(data, backend: str | None) -> tuple[int, int]:
    """Stride and dilation; shorter for Triton, which has programs for each phase of a dilation.

    Of a long one, each pixel of a map is a phase, which is much for its interpreter.
    """
    drawn = st.integers(1, 5) if backend == 'triton' else steps
    return data.draw(drawn), data.draw(drawn)


def draw_local_attention(data, backend, dtype):
    batch, heads, dim = data.draw(batches), data.draw(few), data.draw(st.integers(1, 20))
    size, geometry = data.draw(sizes), (data.draw(kernels), *draw_steps(data, backend))
    scale = data.draw(st.sampled_from([None, 0.0, -0.3, 2.0]))
    shapes = (ceil(size, geometry[1]), size, size)
    tensors = [make(data, (batch, heads, dim, *shape), dtype) for shape in shapes]
    return (
        tensors,
        lambda q, k, v: ops.local_attention(q, k, v, *geometry, scale, backend),
        lambda q, k, v: oracles.local_attention(q, k, v, *geometry, scale),
    )


def draw_group_conv(data, backend, dtype):
    batch, groups, maps, outputs = data.draw(batches), *(data.draw(axes) % 7 + 1 for _ in range(3))
    size, kernel = data.draw(sizes), data.draw(kernels)
    geometry = data.draw(steps), data.draw(steps)
    channels = groups * outputs
    tensors = [
        make(data, (batch, groups, maps, *size), dtype),
        make(data, (channels, maps, kernel, kernel), dtype),
        make(data, (channels,), dtype) if data.draw(st.booleans()) else None,
    ]
    return (
        tensors,
        lambda m, w, b: ops.group_conv(m, w, *geometry, b, backend),
        lambda m, w, b: oracles.group_conv(m, w, *geometry, b),
    )


def draw_fused_acmix(data, backend, dtype):
    batch, heads, dim, inputs = data.draw(batches), data.draw(few), data.draw(few), data.draw(few)
    size, kernel = data.draw(sizes), data.draw(st.sampled_from([1, 3, 5]))
    geometry = data.draw(kernels), *draw_steps(data, backend)
    channels = heads * dim
    shapes = (
        (batch, inputs, *size), (3 * channels, inputs, 1, 1), (3 * channels,), (dim, 2),
        (channels, 3 * heads, kernel, kernel),
        (channels,) if data.draw(st.booleans()) else None,
        (data.draw(st.sampled_from([1, channels])),),
    )  # fmt: skip
    # Of the projections, half as large, logits are as in networks: of larger ones, a softmax makes
    # more of maps that are rounded to half precision than the bounds allow.
    projections = (1, 2, 3) if dtype in (torch.float16, torch.bfloat16) else ()
    tensors = [
        None if shape is None else make(data, shape, dtype, 0.5 if i in projections else 1)
        for i, shape in enumerate(shapes)
    ]
    return (
        tensors,
        lambda *t: ops.fused_acmix(*t, heads, *geometry, backend),
        lambda *t: oracles.fused_acmix(*t, heads, *geometry),
    )


def draw_local_aggregation(data, backend, dtype):
    batch, groups, share = data.draw(batches), data.draw(few), data.draw(few)
    size, geometry = data.draw(sizes), (data.draw(kernels), data.draw(steps), data.draw(steps))
    mode = data.draw(st.sampled_from(['reflect', 'zeros']))
    weights = (batch, groups, geometry[0] ** 2, *ceil(size, geometry[1]))
    tensors = [make(data, s, dtype) for s in ((batch, groups * share, *size), weights)]
    return (
        tensors,
        lambda v, w: ops.local_aggregation(v, w, *geometry, mode, backend),
        lambda v, w: oracles.local_aggregation(v, w, *geometry, mode),
    )


def draw_norm(data, channels: int, dtype) -> tuple[nn.Module, nn.Module]:
    """The same batch norm twice, the second in float64; after training, with a batch's variance."""
    affine = data.draw(st.booleans())
    norm = nn.BatchNorm2d(channels, affine=affine, momentum=None).to(dtype)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.train(dtype == torch.float64 and data.draw(st.booleans()))  # of few numbers: badly posed
    return norm, copy.deepcopy(norm).double()


def draw_patch_weights(data, backend, dtype):
    batch, channels, outputs = data.draw(batches), data.draw(few), data.draw(st.integers(1, 20))
    size, stride, dilation = data.draw(sizes), data.draw(steps), data.draw(st.integers(1, 40))
    kernel = data.draw(st.sampled_from([1, 3, 5]))
    inputs = channels * (1 + kernel**2)
    norm, exact = draw_norm(data, inputs, dtype)
    shapes = ((batch, channels, *ceil(size, stride)), (batch, channels, *size))
    tensors = [make(data, s, dtype) for s in (*shapes, (outputs, inputs, 1, 1))]
    geometry = kernel, stride, dilation

    return (
        tensors,
        lambda q, k, w: ops.patch_weights(q, k, w, norm, *geometry, backend),
        lambda q, k, w: oracles.patch_weights(q, k, w, exact, *geometry),
        exact,
    )


def draw_norm_relu_conv(data, backend, dtype):
    batch, channels, outputs = data.draw(batches), data.draw(few), data.draw(st.integers(1, 20))
    norm, exact = draw_norm(data, channels, dtype)
    tensors = [
        make(data, (batch, channels, *data.draw(sizes)), dtype),
        make(data, (outputs, channels, 1, 1), dtype),
        make(data, (outputs,), dtype) if data.draw(st.booleans()) else None,
    ]
    return (
        tensors,
        lambda x, w, b: ops.norm_relu_conv(x, norm, w, b),
        lambda x, w, b: oracles.norm_relu_conv(x, exact, w, b),
        exact,
    )


OPERATORS = {
    'local_attention': draw_local_attention,
    'group_conv': draw_group_conv,
    'fused_acmix': draw_fused_acmix,
    'local_aggregation': draw_local_aggregation,
    'patch_weights': draw_patch_weights,
    'norm_relu_conv': draw_norm_relu_conv,
}
CALLS = [(name, b) for name in list(OPERATORS)[:3] for b in BACKENDS if b != 'triton']
CALLS += [(n, b) for n in ('patch_weights', 'local_aggregation') for b in BACKENDS if b != 'triton']
CALLS += [('norm_relu_conv', None)]


def rounding_decides(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Which side of a ReLU numbers are on, and so its gradients.

    Other dtypes have such numbers now and then; in float64, equal numbers become zero where a norm
    takes their own statistics and has no bias.
    """
    alone = norm.training and not norm.affine
    return dtype != torch.float64 or (alone and norm.running_var.min().item() < 1e-12)


def check_call(data, name: str, backend: str | None, dtype: torch.dtype) -> None:
    """Result and gradients equal the oracle's; inputs stay as they were."""
    tensors, operator, oracle, *norms = OPERATORS[name](data, backend, dtype)
    before = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    with torch.set_grad_enabled(data.draw(st.booleans(), label='gradients')):
        try:
            expected = oracle(*before)
        except ValueError:  # a batch norm of one value
            with pytest.raises(ValueError, match='more than 1 value per channel'):
                operator(*tensors)
            return
        out = operator(*tensors)
    assert out.dtype == dtype
    assert out.device == tensors[0].device
    assert_close(out, expected, f'result of {name}')
    for tensor, copied in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor.double(), copied)
    if not out.requires_grad or any(rounding_decides(norm, dtype) for norm in norms):
        return
    inputs = [t for t in tensors if t is not None]
    exact = [t for t in before if t is not None]
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for i, (result, right) in enumerate(zip(ours, theirs, strict=True)):
        assert result.dtype == dtype
        summands = grad.numel() / max(1, right.numel())
        assert_close(result, right, f'gradient {i} of {name}', summands=summands)


@fuzzed(20, 240)
@pytest.mark.parametrize(('name', 'backend'), CALLS)
def test_right_for_anything(name, backend, examples, campaign):
    def check(data):
        check_call(data, name, backend, data.draw(dtypes))

    fuzz(check, examples, campaign, f'{name}, {backend}')


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize('name', ['local_attention', 'group_conv', 'fused_acmix', 'patch_weights'])
def test_right_for_anything_triton(name, campaign):
    """Few: the interpreter takes a second for what a GPU does at once."""
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

    def check(data):
        check_call(data, name, 'triton', data.draw(dtypes))

    fuzz(check, 25, campaign, f'{name}, triton')


def valid(name: str) -> dict:
    """Arguments of a call that works."""
    maps = torch.randn(2, 4, 3, 6, 5)
    if name == 'local_attention':
        return {'query': maps, 'key': maps, 'value': maps, 'kernel_size': 3}
    if name == 'group_conv':
        return {'maps': maps, 'weight': torch.randn(8, 3, 3, 3), 'bias': torch.randn(8)}
    if name == 'fused_acmix':
        shapes = {
            'x': (2, 3, 6, 5), 'weight': (24, 3, 1, 1), 'bias': (24,), 'slopes': (4, 2),
            'kernel': (8, 6, 3, 3), 'kernel_bias': (8,), 'scale': (1,),
        }  # fmt: skip
        tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
        return {**tensors, 'num_heads': 2, 'attn_kernel_size': 3}
    if name == 'local_aggregation':
        weight = torch.randn(2, 2, 9, 6, 5)
        return {'value': maps[:, :, 0], 'weight': weight, 'kernel_size': 3}
    if name == 'patch_weights':
        query, key = maps[:, :, 0], maps[:, :, 1]
        weight, norm = torch.randn(5, 40, 1, 1), nn.BatchNorm2d(40)
        return {'query': query, 'key': key, 'weight': weight, 'norm': norm, 'kernel_size': 3}
    x, weight = maps[:, :, 0], torch.randn(5, 4, 1, 1)
    return {'x': x, 'norm': nn.BatchNorm2d(4), 'weight': weight, 'bias': torch.randn(5)}


WRONG_NUMBERS = [0, -1, 1.5, '3', None, True, 2**31, 2**63 - 1, 2**70]
WRONG_TENSORS = {
    'no tensor': lambda t: t.tolist(),
    'a number': lambda t: 3,
    'an array': lambda t: t.numpy(),
    'integers': lambda t: t.long(),
    'complex': lambda t: t.to(torch.complex64),
    'another dtype': lambda t: t.double(),
    'another device': lambda t: t.to('meta'),
    'a dimension more': lambda t: t[None],
    'a dimension less': lambda t: t[0],
    'no dimension': lambda t: t.flatten()[0],
    'one channel more': lambda t: torch.cat([t, t[:, :1]], 1) if t.dim() > 1 else t.repeat(2)[:-1],
    'one column more': lambda t: torch.cat([t, t[..., :1]], -1),
    'one row less': lambda t: t[..., 1:, :] if t.dim() > 1 else t[1:],
    'no columns': lambda t: t[..., :0],
    'no channels': lambda t: t[:, :0] if t.dim() > 1 else t[:0],
}


# Other values that fit.
FITTING = {(key, what) for key in ('maps', 'x') for what in ('one column more', 'one row less')}
FITTING |= {(key, 'another dtype') for key in ('slopes', 'scale')} | {('scale', 'one channel more')}


@pytest.mark.parametrize('backend', [None, *(b for b in BACKENDS if b != 'triton')])
@pytest.mark.parametrize('name', OPERATORS)
def test_wrong_arguments_are_named(name, backend):
    """Each, for each argument, ends in an error that names it, or a tensor that it does not fit."""
    operator = getattr(ops, name)
    parameters = inspect.signature(operator).parameters
    arguments = valid(name)
    if 'backend' in parameters:
        arguments['backend'] = backend
    elif backend is not None:
        return  # there is one implementation
    operator(**arguments)
    numbers = {'kernel_size', 'attn_kernel_size', 'stride', 'dilation', 'num_heads'} & {*parameters}
    tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
    wrong = [(number, value, value) for number in numbers for value in WRONG_NUMBERS]
    wrong += [(key, 2, 2) for key in numbers if 'size' in key]
    wrong += [(key, 'none', 'none') for key in ('backend', 'padding_mode') if key in parameters]
    wrong += [
        (key, what, change(arguments[key]))
        for key in tensors
        for what, change in WRONG_TENSORS.items()
        if (key, what) not in FITTING
    ]
    for key, what, value in wrong:
        named = '|'.join(tensors if key in tensors else [key])
        with pytest.raises((ValueError, TypeError), match=rf'\b({named})\b'):
            pytest.fail(f'{key}, {what}: {operator(**{**arguments, key: value}).shape}')


@pytest.mark.parametrize('backend', [b for b in BACKENDS if b != 'triton'])
def test_largest_steps(backend):
    """Strides and dilations of any size: reflection is periodic, and zeros are zeros."""
    maps = torch.randn(1, 2, 3, 6, 5, dtype=torch.float64)
    largest = 2**31 - 1
    out = ops.local_attention(maps, maps, maps, 5, 1, largest, backend=backend)
    period = math.lcm(10, 8)
    torch.testing.assert_close(
        out, oracles.local_attention(maps, maps, maps, 5, 1, largest % period + period)
    )
    out = ops.local_attention(maps[..., :1, :1], maps, maps, 5, largest, backend=backend)
    torch.testing.assert_close(out, oracles.local_attention(maps, maps, maps, 5)[..., :1, :1])
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    out = ops.group_conv(maps, weight, largest, largest, backend=backend)
    middle = oracles.group_conv(maps[..., :1, :1], weight[..., 1:2, 1:2], 1, 1, None)
    torch.testing.assert_close(out, middle)
