"""What holds for every operator: layouts, all kinds of derivatives, needed ones, hostile calls."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from devices import device_of, needs_native, needs_triton, operators_on_tensors
from fuzzing import LAYOUTS, fuzz, fuzzed
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from acmix_mm.layers import ACmix
from acmix_mm.ops import (
    available_backends,
    fused_acmix,
    group_conv,
    local_aggregation,
    local_attention,
    norm_relu_conv,
    patch_weights,
)
from acmix_mm.ops.backends import native_backend

BACKENDS = available_backends()
HEADS, DIM, SIZE = 2, 2, (5, 6)


def random(*shape: int, dtype=torch.float64, device='cpu') -> Tensor:
    return torch.randn(shape, dtype=dtype).to(device).requires_grad_()


def operator(name: str, backend: str, dtype=torch.float64) -> tuple[Callable, tuple[Tensor, ...]]:
    """A public operator as a function of tensors, and the tensors."""
    channels = HEADS * DIM
    options = {'dtype': dtype, 'device': device_of(backend)}
    if name == 'local_attention':
        maps = [random(1, HEADS, DIM, *SIZE, **options) for _ in range(3)]
        return lambda q, k, v: local_attention(q, k, v, 3, backend=backend), maps
    if name == 'group_conv':
        maps = random(1, DIM, 3, *SIZE, **options)
        weight, bias = random(channels, 3, 3, 3, **options), random(channels, **options)
        return lambda m, w, b: group_conv(m, w, 2, 1, b, backend=backend), (maps, weight, bias)
    if name == 'fused_acmix':
        shapes = (
            (1, 3, *SIZE), (3 * channels, 3, 1, 1), (3 * channels,), (DIM, 2),
            (channels, 3 * HEADS, 3, 3), (channels,), (1,),
        )  # fmt: skip
        tensors = [random(*shape, **options) for shape in shapes]
        return lambda *t: fused_acmix(*t, HEADS, 3, backend=backend), tensors
    if name == 'local_aggregation':
        tensors = random(1, 4, *SIZE, **options), random(1, 2, 9, *SIZE, **options)
        return lambda v, w: local_aggregation(v, w, 3, backend=backend), tensors
    if name == 'norm_relu_conv':
        norm = nn.BatchNorm2d(4).to(**options)
        tensors = random(2, 4, *SIZE, **options), random(3, 4, 1, 1, **options)
        return lambda x, w: norm_relu_conv(x, norm, w), tensors
    norm = nn.BatchNorm2d(20).to(**options)
    query, key = (random(2, 2, 3, 3, **options) for _ in range(2))
    weight = random(3, 20, 1, 1, **options)
    return lambda q, k, w: patch_weights(q, k, w, norm, 3, backend=backend), (query, key, weight)


# Whose gradients may be differentiated again; the others refuse.
TWICE = {('group_conv', backend) for backend in BACKENDS if backend != 'triton'}
TWICE |= {('norm_relu_conv', 'torch'), ('patch_weights', 'torch'), ('local_aggregation', 'native')}
OPERATORS = [
    *(
        (name, backend)
        for name in ('local_attention', 'group_conv', 'fused_acmix')
        for backend in BACKENDS
    ),
    *(
        (name, backend)
        for name in ('patch_weights', 'local_aggregation')
        for backend in BACKENDS
        if backend != 'triton'
    ),
    ('norm_relu_conv', 'torch'),
]
every_operator = pytest.mark.parametrize(('name', 'backend'), OPERATORS)


def dtype_of(name: str, backend: str) -> torch.dtype:
    return torch.float32 if backend == 'triton' else torch.float64


@every_operator
def test_second_order_gradients(name, backend):
    """Right, by finite differences of the gradients, or refused; never silently something else."""
    if (name, backend) == ('group_conv', 'triton'):
        return  # too slow here: see test_triton_group_conv.py
    function, tensors = operator(name, backend, dtype_of(name, backend))
    if (name, backend) in TWICE:
        assert torch.autograd.gradgradcheck(function, tuple(tensors))
        return
    gradients = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(NotImplementedError, match='has no second-order gradients'):
        penalty.backward()


NAMES = list(dict(OPERATORS))


def in_evaluation(name: str, backend: str | None) -> tuple[Callable, tuple[Tensor, ...]]:
    """As :func:`operator`, without gradients, and batch norms by their running statistics."""
    function, tensors = operator(name, backend)
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, nn.Module):
            cell.cell_contents.eval()
    return function, tuple(t.detach() for t in tensors)


def differences(function: Callable, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    """The directional derivative, by central differences."""
    step = 1e-5
    ends = [
        function(*(t + sign * step * d for t, d in zip(tensors, tangents, strict=True)))
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize('backend', [None, 'torch'])
@pytest.mark.parametrize('name', NAMES)
def test_forward_mode(name, backend):
    """Tangents, with gradients on and off, by the two ways that PyTorch has."""
    function, tensors = in_evaluation(name, backend)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    with torch.no_grad():
        expected = differences(function, tensors, tangents)
    results = [torch.func.jvp(function, tensors, tangents)[1]]
    for context in (nullcontext(), torch.no_grad()):
        with forward_ad.dual_level(), context:
            duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
            results.append(forward_ad.unpack_dual(function(*duals)).tangent)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_transforms(name):
    """Of torch.func: maps over samples, of gradients too, and Jacobians by either mode."""
    function, tensors = in_evaluation(name, None)

    def loss(*tensors):
        return function(*tensors).square().sum()

    batches = tuple(torch.stack([t, t + 1]) for t in tensors)
    samples = list(zip(*batches, strict=True))
    torch.testing.assert_close(
        torch.func.vmap(function)(*batches), torch.stack([function(*s) for s in samples])
    )
    gradients = [
        torch.autograd.grad(loss(first.requires_grad_(), *rest), first)[0]
        for first, *rest in samples
    ]
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss))(*batches), torch.stack(gradients)
    )
    expected = torch.autograd.functional.jacobian(lambda t: function(t, *tensors[1:]), tensors[0])
    torch.testing.assert_close(torch.func.jacrev(function)(*tensors), expected)
    torch.testing.assert_close(torch.func.jacfwd(function)(*tensors), expected)


@needs_native
@pytest.mark.parametrize('name', NAMES[:-1])
def test_kernels_refuse_forward_mode(name):
    """On demand; left to choose, another backend is taken."""
    function, tensors = in_evaluation(name, 'native')
    with pytest.raises(ValueError, match=f"backend 'native' of {name} needs no forward-mode"):
        torch.func.jvp(function, tensors, tensors)


@every_operator
def test_only_needed_gradients(name, backend):
    """Each alone is what it is among all."""
    function, tensors = operator(name, backend, dtype_of(name, backend))
    grad = torch.randn_like(function(*tensors))
    together = torch.autograd.grad(function(*tensors), tensors, grad)
    for i, expected in enumerate(together):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (gradient,) = torch.autograd.grad(function(*alone), alone[i], grad)
        torch.testing.assert_close(gradient, expected)


@needs_native
def test_work_that_nobody_needs_is_left(monkeypatch):
    """By calls of the native kernels: of a deployed layer, what is trained, and nothing else."""
    calls = []
    for name in ('local_attention_add_', 'local_attention_backward_add_'):
        kernel = getattr(native_backend, name)
        monkeypatch.setattr(
            native_backend, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a)
        )
    x = torch.randn(1, 8, 5, 6, requires_grad=True)
    layer = ACmix(8, 8, backend='native').eval()
    layer.switch_to_deploy(nn.BatchNorm2d(8).eval())  # a scale for every channel
    layer(x).sum().backward()
    assert calls == ['local_attention_add_', 'local_attention_backward_add_']
    calls.clear()
    layer.kernel.requires_grad_()
    layer(x.detach()).sum().backward()
    assert calls == ['local_attention_add_']
    assert layer.kernel.grad.any()


def custom_operators(dtype=torch.float32) -> dict[str, tuple]:
    """Arguments of every custom operator of the package that is there, without gradients."""
    maps = [torch.randn(2, HEADS, DIM, *SIZE, dtype=dtype) for _ in range(3)]
    lse = torch.randn(2, HEADS, *SIZE)
    channels = HEADS * DIM
    image, out = torch.randn(2, 6, *SIZE), torch.randn(2, channels, *SIZE)
    weight = torch.randn(channels, 3, 3, 3)
    acmix = (
        torch.randn(2, 3, *SIZE), torch.randn(3 * channels, 3, 1, 1), torch.randn(3 * channels),
        torch.randn(DIM, 2), torch.randn(channels, 3 * HEADS, 3, 3),
    )  # fmt: skip
    geometry = (HEADS, 3, 1, 1)
    scale = torch.randn(1)
    patch = (
        torch.randn(2, 2, *SIZE), torch.randn(2, 2, 7, 8), *torch.randn(3, 20), torch.randn(20, 4),
        3, 1, 1,
    )  # fmt: skip
    everything = {
        'group_conv_native': (image, weight, torch.randn(channels), 1, 1, DIM),
        'group_conv_native_grad_input': (out, weight, *SIZE, 1, 1, DIM),
        'group_conv_native_grad_weight': (out, image, 3, 1, 1, DIM),
        'fused_acmix': (*acmix, torch.randn(channels), scale, *geometry),
        'fused_acmix_backward': (out, lse, *acmix, scale, *geometry, [True] * 6),
        'local_aggregation': (torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, *SIZE), 3, 1, 1),
        'local_aggregation_backward': (
            torch.randn(2, 4, *SIZE), torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, *SIZE),
            3, 1, 1, [True, True],
        ),
        'local_aggregation_native': (
            torch.randn(2, 4, *SIZE), torch.randn(2, 2, 9, *SIZE), 3, 1, 1, False,
        ),
        'local_aggregation_native_grad_value': (
            torch.randn(2, 4, *SIZE), torch.randn(2, 2, 9, *SIZE), *SIZE, 3, 1, 1, True,
        ),
        'local_aggregation_native_grad_weight': (
            torch.randn(2, 4, *SIZE), torch.randn(2, 4, *SIZE), 2, 3, 1, 1, False,
        ),
        'patch_weights_native': patch,
        'patch_weights_native_backward': (torch.randn(2, 4, *SIZE), *patch),
        'local_attention_native_forward': (*maps, 3, 1, 1, 0.5),
        'local_attention_native_backward': (maps[0], *maps, lse, 3, 1, 1, 0.5),
    }  # fmt: skip
    if 'native' not in BACKENDS:
        plain = ('local_aggregation', 'local_aggregation_backward')
        everything = {n: a for n, a in everything.items() if n in plain}
    return everything


def native_operators() -> set[str]:
    names = {name.removeprefix('acmix_mm::') for name in operators_on_tensors()}
    return {n for n in names if '_torch' not in n and '_triton' not in n}


def channels_last(tensor):
    """The same numbers with the second dimension innermost."""
    if not isinstance(tensor, Tensor) or tensor.dim() < 4:
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
@pytest.mark.parametrize('name', custom_operators())
def test_opcheck(name, layout):
    """Schema, autograd registration and fake kernel with the real strides, as Inductor needs."""
    arguments = custom_operators()[name]
    if layout == 'channels last':
        arguments = tuple(map(channels_last, arguments))
    differentiable = 'backward' not in name
    arguments = [
        a.requires_grad_() if differentiable and isinstance(a, Tensor) else a for a in arguments
    ]
    torch.library.opcheck(getattr(torch.ops.acmix_mm, name).default, tuple(arguments))


def test_every_custom_operator_is_checked():
    """Here, or (attention in PyTorch, and all in Triton) beside the backend's other tests."""
    native = native_operators() - set(parts_of_operators())
    assert native <= set(custom_operators())


def parts_of_operators() -> dict[str, tuple]:
    """Arguments of those that are called by other operators only, of some rows of maps."""
    maps = [torch.randn(2, HEADS, DIM, *SIZE) for _ in range(7)]
    image, out = torch.randn(2, 6, *SIZE), torch.randn(2, HEADS * DIM, *SIZE)
    weight, bias = torch.randn(HEADS * DIM, 3, 3, 3), torch.randn(HEADS * DIM)
    slopes, factor, lse = (
        torch.randn(shape) for shape in ((DIM, 2), (HEADS, DIM), (2, HEADS, *SIZE))
    )
    geometry = (3, 1, 1, 0.5, SIZE[0], 0, 0)
    return {
        'group_conv_native_rows_': (
            out,
            image,
            torch.randn(6),
            weight,
            bias,
            1,
            1,
            DIM,
            SIZE[0],
            0,
            0,
        ),
        'group_conv_native_grad_input_rows_': (image, out, weight, 1, 1, DIM, SIZE[0], 0),
        'group_conv_native_grad_weight_rows': (
            out,
            image,
            torch.randn(6),
            3,
            1,
            1,
            DIM,
            SIZE[0],
            0,
            0,
        ),
        'local_attention_native_forward_add_': (
            maps[0],
            lse,
            *maps[1:4],
            slopes,
            factor,
            *geometry,
        ),
        'local_attention_native_backward_add_': (
            *maps[:5],
            factor,
            *maps[5:],
            slopes,
            1.0,
            lse,
            *geometry,
        ),
    }


INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31 + 1, 2**62 + 1, 2**63 - 1]
SIZES = [0, 1, 2, 5, 2**41, 2**50]


def hostile(data, value):
    """Something else in the place of an argument, of the type that its schema has."""
    if isinstance(value, bool | list | float) or value is None:
        return value
    if isinstance(value, int):
        return data.draw(st.sampled_from(INTEGERS))
    kind = data.draw(st.sampled_from(['layout', 'size', 'dimension', 'dtype', 'empty']))
    if kind == 'layout':
        return LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](value)
    if kind == 'dtype':
        return value.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.int64])))
    if kind == 'empty':
        return value[..., :0]
    if kind == 'dimension':
        return data.draw(st.sampled_from([value[None], value[0], value.flatten(), value.sum()]))
    shape = list(value.shape)  # of one number, which memory holds once
    shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(st.sampled_from(SIZES))
    return value.flatten()[0].expand(shape)


@needs_native
@fuzzed(40, 300)
@pytest.mark.parametrize('name', sorted(native_operators()))
def test_hostile_calls(name, examples, campaign):
    """Of operators as they are, without the checks in front: an exception or finite numbers.

    Never the end of the process, nor (by tools/dev/sanitize.sh) numbers from beyond a tensor.
    """
    operator = getattr(torch.ops.acmix_mm, name)

    def check(data):
        arguments = list({**custom_operators(), **parts_of_operators()}[name])
        for place in data.draw(st.sets(st.integers(0, len(arguments) - 1), min_size=1, max_size=3)):
            arguments[place] = hostile(data, arguments[place])
        try:
            results = operator(*arguments)
        except Exception:
            return
        if 'backward' not in name:  # whose lse need not be one
            results = [results] if isinstance(results, Tensor) else results or ()
            assert all(result.isfinite().all() for result in results)

    fuzz(check, examples, campaign, name)


@needs_triton
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({1: torch.ones(1, 1, 2, 3, 3)}, 'value must have the shape of key'),
        ({2: torch.ones(1, 1, 2, 4, 3)}, 'value must have the shape of key'),
        ({0: torch.ones(1, 1, 2, 9, 9)}, 'query must have shape'),
        ({2: torch.ones(1, 1, 2, 3, 4).half()}, 'must have one dtype'),
        ({3: torch.ones(3, 2)}, 'slopes must have shape'),
        ({3: torch.ones(2, 2), 5: torch.ones(3)}, 'factor must have shape'),
        ({6: -3}, 'kernel_size must be a positive odd integer'),
        ({7: 2**40}, 'stride must be at most'),
        ({8: 2**63 - 1}, 'dilation must be at most'),
    ],
)
def test_hostile_calls_of_triton(changes, message):
    """Forward and backward; kernels on a GPU read where they are told to."""
    maps = torch.ones(1, 1, 2, 3, 4)
    arguments = [maps, maps, maps, None, None, None, 3, 1, 1, 1.0]
    for place, value in changes.items():
        arguments[place] = value
    operators = torch.ops.acmix_mm
    with pytest.raises(ValueError, match=message):
        operators.local_attention_triton_forward(*arguments, True)
    lse = torch.ones(1, 1, 3, 4)
    given = (*arguments[:4], arguments[5], maps, lse, *arguments[6:], [True] * 5)
    with pytest.raises(ValueError, match=message):
        operators.local_attention_triton_backward(maps, *given)


@needs_native
@pytest.mark.parametrize('dilation', [2**62, 2**63 - 1, 4])
def test_reach_beyond_the_map(dilation):
    """A product that overflowed, and read from before the map."""
    query, padded, *vectors = torch.randn(1, 1, 5, 5), torch.randn(1, 1, 7, 7), *torch.randn(3, 10)
    with pytest.raises(RuntimeError, match='padded must have more rows and columns than'):
        torch.ops.acmix_mm.patch_weights_native(
            query, padded, *vectors, torch.ones(10, 4), 3, 1, dilation
        )


@needs_native
@pytest.mark.parametrize('kernel_size', [2**15 + 1, 2**31 + 1, 2**62 + 1, 2**63 - 1])
def test_kernel_beyond_memory(kernel_size):
    maps = torch.randn(1, 1, 1, 3, 3)
    with pytest.raises(RuntimeError, match='kernel_size must be odd, positive and at most 32767'):
        torch.ops.acmix_mm.local_attention_native_forward(maps, maps, maps, kernel_size, 1, 1, 1.0)
    with pytest.raises(RuntimeError, match='kernel_size, stride, dilation and columns of key must'):
        torch.ops.acmix_mm.local_attention_native_forward(maps, maps, maps, 32767, 1, 2**40, 1.0)
    weight = maps[0, :, :, :1, :1].expand(1, 1, 1, kernel_size)
    with pytest.raises(RuntimeError, match='weight must have an odd kernel of side 32767 at most'):
        torch.ops.acmix_mm.group_conv_native(maps[0], weight, None, 1, 1, 1)
