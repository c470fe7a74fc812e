import itertools
import math
import random

import pytest
import torch
from devices import device_of, needs_triton, slow_if_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from acmix_mm.ops import available_backends, local_attention
from acmix_mm.ops import reference as oracles
from acmix_mm.ops.backends import torch_backend, triton_backend

BACKENDS = available_backends()
SINGLE_AND_HALF = [torch.float32, torch.bfloat16, torch.float16]
# What a backend takes, the most precise first.
DTYPES = {
    'torch': [torch.float64, *SINGLE_AND_HALF],
    'native': [torch.float64, *SINGLE_AND_HALF],
    'triton': SINGLE_AND_HALF,
}
# Of the error, relative to the value plus the largest value. (Triton's interpreter truncates to
# bfloat16 where a GPU rounds.)
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
DEVICE = {backend: device_of(backend) for backend in BACKENDS}
# Triton's interpreter takes seconds for what the others do in milliseconds.
INTERPRETED = triton_backend.INTERPRETED


def examples(backend):
    """Of arguments up to dilation, smaller and fewer where examples are slow."""
    slow = backend == 'triton' and INTERPRETED
    shapes = st.tuples(
        st.integers(1, 1 if slow else 2),  # batch
        st.integers(1, 2 if slow else 3),  # heads
        st.integers(1, 9),  # head dimension
        st.integers(1, 10 if slow else 21),  # height
        st.integers(1, 18 if slow else 21),  # width
    )
    examples = given(
        shape=shapes,
        kernel_size=st.sampled_from([1, 3, 5, 7]),
        stride=st.integers(1, 3),
        dilation=st.integers(1, 3 if slow else 4),
        seed=st.integers(0, 99),
    )
    limit = settings(max_examples=8 if slow else 60, deadline=None)
    return lambda check: limit(examples(check))


def inputs(backend, shape, stride, dtype=None, seed=0):
    """Query, key and value, in the backend's most precise dtype unless another is given."""
    generator = torch.Generator().manual_seed(seed)
    *lead, height, width = shape
    queries = (*lead, -(-height // stride), -(-width // stride))
    dtype = DTYPES[backend][0] if dtype is None else dtype
    return [
        torch.randn(s, generator=generator, dtype=torch.float64)
        .to(DEVICE[backend], dtype)
        .requires_grad_()
        for s in (queries, shape, shape)
    ]


def assert_agree_with_oracle(backend, tensors, kernel_size, stride=1, dilation=1):
    """Output and gradients."""
    out = local_attention(*tensors, kernel_size, stride, dilation, backend=backend)
    dtype = tensors[0].dtype
    assert out.dtype == dtype
    exact = oracles.local_attention(*tensors, kernel_size, stride, dilation)
    grad = torch.randn(out.shape, dtype=dtype, device=out.device)
    gradients = torch.autograd.grad(out, tensors, grad)
    # The oracle's gradients come back in the dtype of its leaves, so both sides are rounded once.
    exact_gradients = torch.autograd.grad(exact, tensors, grad.double())
    for result, oracle in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        # Inputs are of the order of 1; gradients may all but cancel.
        largest = max(1, oracle.abs().max().item())
        torch.testing.assert_close(
            result.double(),
            oracle.double(),
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * largest,
        )


@pytest.mark.parametrize('backend', slow_if_interpreted(BACKENDS))
def test_equals_unfolded_attention(backend):
    @examples(backend)
    def check(shape, kernel_size, stride, dilation, seed):
        tensors = inputs(backend, shape, stride, seed=seed)
        assert_agree_with_oracle(backend, tensors, kernel_size, stride, dilation)

    check()


@pytest.mark.parametrize(
    ('backend', 'dtype'),
    [(backend, dtype) for backend in BACKENDS for dtype in SINGLE_AND_HALF],
)
@pytest.mark.parametrize(
    ('shape', 'kernel_size', 'stride', 'dilation'),
    [
        ((2, 4, 16, 25, 38), 7, 1, 1),
        ((1, 2, 8, 17, 33), 7, 2, 1),
        ((1, 2, 8, 14, 9), 3, 1, 3),
        ((1, 1, 4, 1, 6), 7, 1, 1),
    ],
)
def test_rounding_of_each_dtype(backend, dtype, shape, kernel_size, stride, dilation):
    if backend == 'triton' and INTERPRETED:
        shape = (1, 1, *shape[2:])
    tensors = inputs(backend, shape, stride, dtype)
    assert_agree_with_oracle(backend, tensors, kernel_size, stride, dilation)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dim', [1, 24, 64, 128])
def test_head_dimensions(backend, dim):
    assert_agree_with_oracle(backend, inputs(backend, (1, 1, dim, 9, 7), 1), 5)


@pytest.mark.parametrize('backend', [b for b in BACKENDS if torch.float64 in DTYPES[b]])
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_gradcheck(backend, stride, dilation):
    tensors = inputs(backend, (1, 2, 2, 4, 5), stride)
    assert torch.autograd.gradcheck(
        lambda q, k, v: local_attention(q, k, v, 3, stride, dilation, backend=backend), tensors
    )


@pytest.mark.parametrize('backend', BACKENDS)
def test_kernel_of_one_returns_value(backend):
    query, key, value = inputs(backend, (2, 3, 4, 6, 5), 2)
    out = local_attention(query, key, value, kernel_size=1, stride=2, backend=backend)
    torch.testing.assert_close(out, value[..., ::2, ::2])


@pytest.mark.parametrize('backend', BACKENDS)
def test_equal_keys_average_the_neighbourhood(backend):
    """With equal logits, attention is a mean filter over the reflect-padded map."""
    query, _, value = inputs(backend, (1, 2, 3, 9, 11), 1)
    out = local_attention(query, torch.zeros_like(value), value, 5, backend=backend)
    padded = torch.nn.functional.pad(value[0], (2, 2, 2, 2), mode='reflect')
    expected = torch.nn.functional.avg_pool2d(padded, 5, stride=1)[None]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_large_logits_and_scale(backend):
    query, key, value = (1000 * t.detach() for t in inputs(backend, (1, 1, 4, 6, 7), 1))
    out = local_attention(query, key, value, 3, backend=backend)
    assert torch.isfinite(out).all()
    tensors = inputs(backend, (1, 1, 4, 6, 7), 1)
    out = local_attention(*tensors, 3, scale=0.25, backend=backend)
    expected = oracles.local_attention(*tensors, 3, scale=0.25).to(out.dtype)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_strided_inputs_and_empty_batch(backend):
    query, key, value = (
        t.detach().transpose(1, 2).contiguous().transpose(1, 2)
        for t in inputs(backend, (2, 3, 4, 9, 8), 1)
    )
    out = local_attention(query, key, value, backend=backend)
    expected = local_attention(*(t.contiguous() for t in (query, key, value)), backend=backend)
    torch.testing.assert_close(out, expected)
    assert local_attention(query[:0], key[:0], value[:0], backend=backend).shape == (0, 3, 4, 9, 8)


@pytest.mark.parametrize('backend', ['torch'])
def test_chunks_do_not_change_results(backend, monkeypatch):
    """Several samples, and several rows of tiles, in a chunk against one row at a time."""
    tensors = inputs(backend, (3, 2, 4, 30, 20), 1, torch.float32)
    results = []
    for chunk_bytes in (1, 200_000, 1 << 30):
        monkeypatch.setitem(torch_backend.CHUNK_BYTES, 'cpu', chunk_bytes)
        out = local_attention(*tensors, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize('backend', slow_if_interpreted(BACKENDS))
def test_opcheck(backend):
    """Schema, fake kernel and autograd registration, as torch.compile needs them."""
    tensors = inputs(backend, (1, 2, 3, 7, 6), 2, torch.float32)
    name = f'local_attention_{backend}' + ('' if backend == 'torch' else '_forward')
    op = getattr(torch.ops.acmix_mm, name).default
    torch.library.opcheck(op, forward_arguments(backend, tensors, (3, 2, 1, 0.5)))


@pytest.mark.parametrize('backend', slow_if_interpreted(BACKENDS))
def test_compiles_as_one_graph(backend):
    tensors = inputs(backend, (1, 2, 4, 9, 10), 1, torch.float32)

    def loss(query, key, value):
        return local_attention(query, key, value, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    tensors = inputs(backend, (1, 2, 4, 9, 10), 1, torch.float32)
    with torch.autocast(DEVICE[backend], dtype=dtype):
        out = local_attention(*tensors, backend=backend)
    assert out.dtype == dtype
    expected = local_attention(*(t.to(dtype) for t in tensors), backend=backend)
    torch.testing.assert_close(out, expected)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize('backend', BACKENDS)
def test_training_saves_inputs_only(backend):
    """What autograd keeps is no more than inputs, output and a number a query and head."""
    query, key, value = inputs(backend, (1, 2, 8, 40, 40), 1, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        local_attention(query, key, value, backend=backend)
    numbers = sum(t.numel() for t in saved)
    assert 3 * query.numel() <= numbers <= 4 * query.numel() + query[:, :, 0].numel()


@needs_triton
@pytest.mark.parametrize(('dtype', 'dim'), [(torch.float64, 4), (torch.float32, 129)])
def test_triton_refuses_what_it_does_not_support(dtype, dim):
    tensors = inputs('triton', (1, 1, dim, 3, 4), 1, dtype)
    got = f'got a head dimension of {dim}, {dtype} and {DEVICE["triton"]}'
    with pytest.raises(ValueError, match=f'needs float16, bfloat16 or float32, .* {got}'):
        local_attention(*tensors, backend='triton')
    # Another backend is chosen.
    torch.testing.assert_close(local_attention(*tensors, 1), tensors[2])


@needs_triton
def test_tiles_of_triton():
    """Of every kind of product and head dimension, of which each query takes 208 keys at most."""
    tiles = triton_backend.kernels.TILES
    assert set(tiles) == set(itertools.product(['half', 'tf32', 'ieee'], [16, 32, 64, 128]))
    for height, width, block, _ in tiles.values():
        keys = (height + 6) * (width + 6)
        assert -(-keys // block) * block <= 208


@needs_triton
def test_triton_launches_phases_that_have_queries(monkeypatch):
    """At a dilation of 4, six of 4 * 4."""
    programs = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            programs.append(grid({'TILE_Y': 4, 'TILE_X': 8}))
            return self.kernel[grid]

    monkeypatch.setattr(triton_backend, 'wrap_triton', Recorder)
    tensors = [t.detach() for t in inputs('triton', (1, 1, 4, 2, 3), 1)]
    out = local_attention(*tensors, 3, 1, 4, backend='triton')
    expected = oracles.local_attention(*tensors, 3, 1, 4)
    torch.testing.assert_close(out, expected.to(out.dtype))
    assert programs == [(2 * 3,)] * 2  # the second launch is the careful one


@needs_triton
def test_triton_takes_the_largest_steps():
    """Reflection is periodic, and a single query takes no strides."""
    largest = 2**31 - 1
    query, key, value = (t.detach() for t in inputs('triton', (1, 1, 2, 2, 3), 1))
    out = local_attention(query, key, value, 3, 1, largest, backend='triton')
    expected = oracles.local_attention(query, key, value, 3, 1, largest % math.lcm(2, 4))
    torch.testing.assert_close(out, expected.to(out.dtype))
    out = local_attention(query[..., :1, :1], key, value, 3, largest, backend='triton')
    expected = oracles.local_attention(query, key, value, 3)[..., :1, :1]
    torch.testing.assert_close(out, expected.to(out.dtype))


@needs_triton
def test_triton_times_tiles_on_request_only(monkeypatch):
    """Each of the table once for a head dimension and kernel size."""
    timed = []

    def bench(tuner, *args, config, **kwargs):
        timed.append(config)
        return float(len(timed))

    monkeypatch.setattr('triton.runtime.autotuner.Autotuner._bench', bench)
    triton_backend._tuned.cache_clear()
    tensors = [t.detach() for t in inputs('triton', (1, 1, 4, 5, 6), 1)]
    plain = local_attention(*tensors, 3, backend='triton')
    assert not timed
    monkeypatch.setattr(triton_backend, 'AUTOTUNE', True)
    for _ in range(2):
        tuned = local_attention(*tensors, 3, backend='triton')
        assert len(timed) == len(set(triton_backend.kernels.TILES.values()))
        torch.testing.assert_close(tuned, plain)
    triton_backend._tuned.cache_clear()


@needs_triton
@pytest.mark.parametrize('allowed', [False, True])
def test_triton_takes_tf32_where_convolutions_may(allowed):
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        assert triton_backend._precision(torch.float32) == ('tf32' if allowed else 'ieee')
        assert triton_backend._precision(torch.float16) == 'ieee'


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'query': None}, TypeError, 'query must be a floating-point tensor, got NoneType'),
        ({'key': torch.ones(1, 2, 4, 6, 8, dtype=int)}, TypeError, 'key .* got torch.int64'),
        ({'value': torch.ones(2, 4, 6, 8)}, ValueError, r'value must have 5 dim.*\(2, 4, 6, 8\)'),
        ({'value': torch.ones(1, 2, 4, 6, 7)}, ValueError, 'value must have the shape of key'),
        ({'query': torch.ones(1, 2, 4, 3, 4)}, ValueError, r'query must have shape \(1, 2, 4, 6, '),
        ({'key': torch.ones(1, 2, 4, 0, 8)}, ValueError, r'key must have N, d, H, W >= 1'),
        ({'value': torch.ones(1, 2, 4, 6, 8).double()}, ValueError, 'one dtype'),
        ({'kernel_size': 4}, ValueError, 'kernel_size must be a positive odd integer, got 4'),
        ({'kernel_size': 3.0}, ValueError, 'kernel_size must be .* got 3.0'),
        ({'stride': 0}, ValueError, 'stride must be a positive integer, got 0'),
        ({'dilation': True}, ValueError, 'dilation must be a positive integer, got True'),
        ({'scale': math.nan}, ValueError, 'scale must be a finite number or None, got nan'),
        ({'backend': 'cuda'}, ValueError, "backend must be None or one of .* got 'cuda'"),
    ],
)
def test_wrong_arguments(change, error, message):
    tensors = {name: torch.ones(1, 2, 4, 6, 8) for name in ('query', 'key', 'value')}
    with pytest.raises(error, match=message):
        local_attention(**{**tensors, **change})


# Where, which number, in all channels or one, and in which pixel.
NON_FINITE = list(
    itertools.product(
        ['query', 'key', 'value', 'grad'],
        [math.nan, math.inf, -math.inf],
        [slice(None), slice(1, 2)],
        [(0, 0), (-1, -2)],
    )
)


@pytest.mark.parametrize('backend', slow_if_interpreted(BACKENDS))
@pytest.mark.parametrize(
    ('shape', 'kernel_size', 'stride', 'dilation', 'dtype'),
    [
        ((9, 11), 5, 1, 1, torch.float32),
        ((9, 17), 3, 2, 1, torch.float16),
        ((10, 18), 3, 1, 2, torch.bfloat16),
        ((9, 17), 3, 4, 2, torch.float32),  # pixels that no query sees
        ((5, 6), 3, 3, 2, torch.float32),  # ones that a query beyond the map would see
        ((3, 4), 7, 1, 1, torch.float32),  # reflection repeats
        ((1, 6), 5, 1, 1, torch.float32),
        ((5, 6), 1, 2, 1, torch.float32),
    ],
)
@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # of Triton's interpreter
def test_numbers_that_are_not_finite_stay_within_neighbourhoods(
    backend, shape, kernel_size, stride, dilation, dtype
):
    """In a pixel of an input or of the incoming gradient; a sample for each case."""
    slow = backend == 'triton' and INTERPRETED
    number_of_cases = len(NON_FINITE) if not slow else 6 if max(shape) > 8 else 12
    cases = random.Random(f'{shape}').sample(NON_FINITE, number_of_cases)
    full_shape = (len(cases), 1 if slow else 2, 3, *shape)
    tensors = [t.detach() for t in inputs(backend, full_shape, stride, dtype)]
    tensors.append(torch.randn_like(tensors[0]))
    for sample, (name, number, channels, (y, x)) in enumerate(cases):
        maps = tensors[['query', 'key', 'value', 'grad'].index(name)]
        maps[sample, -1, channels, y, x] = number
    *tensors, grad = tensors
    for tensor in tensors:
        tensor.requires_grad_()
    out = local_attention(*tensors, kernel_size, stride, dilation, backend=backend)
    exact = oracles.local_attention(*tensors, kernel_size, stride, dilation)
    results = (out, *torch.autograd.grad(out, tensors, grad))
    expected = (exact, *torch.autograd.grad(exact, tensors, grad.double()))
    names = ('output', 'gradient of query', 'gradient of key', 'gradient of value')
    wrong = []
    for name, result, oracle in zip(names, results, expected, strict=True):
        ours, least = ~result.isfinite(), ~oracle.isfinite()
        wrong += [
            f'{name} of sample {cases[sample]}: {ours[sample].sum()}, not {least[sample].sum()}'
            for sample in (ours != least).flatten(1).any(1).nonzero().flatten()
        ]
        finite = ~(ours | least)
        result, oracle = (t.detach().double().where(finite, 0) for t in (result, oracle))
        tolerance = 2 * TOLERANCE[dtype]  # which is tested elsewhere
        atol = tolerance * max(1, oracle.abs().max().item())
        torch.testing.assert_close(result, oracle, rtol=tolerance, atol=atol)
    assert not wrong, 'numbers that are not finite:\n' + '\n'.join(wrong)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('needed', list(itertools.product([False, True], repeat=3))[1:])
def test_gradients_of_some_inputs(backend, needed):
    tensors = inputs(backend, (1, 1, 3, 5, 6), 2)
    out = local_attention(*tensors, 3, 2, backend=backend)
    expected = torch.autograd.grad(out.square().sum(), tensors)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    local_attention(*tensors, 3, 2, backend=backend).square().sum().backward()
    for tensor, need, gradient in zip(tensors, needed, expected, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize(
    ('needed', 'products'),
    [
        ((True, True, True), 4),
        ((True, False, False), 2),
        ((False, True, False), 2),
        ((False, False, True), 1),
    ],
)
def test_torch_computes_needed_gradients_only(needed, products, monkeypatch):
    """Matrix products beside the logits', for each chunk of tiles, of which there is one here."""
    tensors = inputs('torch', (1, 1, 3, 5, 6), 1)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    out = local_attention(*tensors, 3, backend='torch')
    calls = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, 'bmm', lambda *matrices: calls.append(matrices) or bmm(*matrices))
    out.sum().backward()
    assert len(calls) == products


@needs_triton
@pytest.mark.parametrize(
    ('needed', 'computed'),
    [
        ((True, True, True), [['grad_query'], ['grad_key', 'grad_value']]),
        ((True, False, False), [['grad_query']]),
        ((False, True, False), [['grad_key']]),
        ((False, False, True), [['grad_value']]),
    ],
)
def test_triton_computes_needed_gradients_only(needed, computed, monkeypatch):
    """Kernel by kernel."""
    tensors = inputs('triton', (1, 1, 3, 5, 6), 1)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    out = local_attention(*tensors, 3, backend='triton')
    launch, launched = triton_backend._launch, []

    def record(kernel, query, size, classes, *arguments, **constants):
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        results = ('grad_query', 'grad_key', 'grad_value')
        launched.append([name for name in results if given.get(name) is not None])
        launch(kernel, query, size, classes, *arguments, **constants)

    monkeypatch.setattr(triton_backend, '_launch', record)
    out.sum().backward()
    assert launched == computed


# Of which the operators are registered from Python.
FROM_PYTHON = [backend for backend in BACKENDS if backend != 'native']


def operators(backend):
    """Forward and backward."""
    name = f'local_attention_{backend}'
    names = (name if backend == 'torch' else f'{name}_forward', f'{name}_backward')
    return [getattr(torch.ops.acmix_mm, name).default for name in names]


def forward_arguments(backend, tensors, geometry):
    """Of Triton without position encoding and convolution, but with what is kept for gradients."""
    if backend != 'triton':
        return (*tensors, *geometry)
    return (*tensors, None, None, None, *geometry, True)


def backward_arguments(backend, grad, tensors, results, geometry, needed):
    if backend == 'torch':
        return (grad, *tensors, *geometry, needed)
    output, _, lse = results
    return (grad, *tensors, None, None, output, lse, *geometry, [*needed, False, False])


def channels_last(maps):
    return maps.detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize('backend', FROM_PYTHON)
@pytest.mark.parametrize('layout', [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize('needed', [(True, True, True), (False, True, False), (True, False, True)])
def test_fake_kernels_have_the_layout_of_results(backend, layout, needed):
    """Contiguous in any case; of Triton with channels last."""
    tensors = [layout(t.detach()) for t in inputs(backend, (2, 2, 3, 4, 5), 2, torch.float32)]
    geometry = (3, 2, 1, 0.5)
    forward, backward = operators(backend)
    given = forward_arguments(backend, tensors, geometry)
    out = forward(*given)
    grad = layout(out if backend == 'torch' else out[0])
    back = backward_arguments(backend, grad, tensors, out, geometry, needed)
    calls = [(forward, given), (backward, back)]
    for operator, arguments in calls:
        results = operator(*arguments)
        with FakeTensorMode() as mode:
            fakes = operator(
                *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            )
        results, fakes = ([r] if isinstance(r, torch.Tensor) else r for r in (results, fakes))
        for result in results:
            if backend == 'triton' and result.dim() == 5:
                result = result.permute(0, 3, 4, 1, 2)
            assert result.is_contiguous()
        described = [[(r.shape, r.stride(), r.dtype) for r in rs] for rs in (results, fakes)]
        assert described[0] == described[1]


@pytest.mark.parametrize('backend', slow_if_interpreted(FROM_PYTHON))
def test_opcheck_with_channels_last(backend):
    """Of both directions, with some gradients needed."""
    query, key, value = (
        channels_last(t) for t in inputs(backend, (1, 1, 3, 4, 5), 2, torch.float32)
    )
    geometry = (3, 2, 1, 0.5)
    forward, backward = operators(backend)
    tensors = (query.requires_grad_(), key, value.requires_grad_())
    torch.library.opcheck(forward, forward_arguments(backend, tensors, geometry))
    tensors = [t.detach() for t in tensors]
    results = forward(*forward_arguments(backend, tensors, geometry))
    needed = (True, False, True)
    given = backward_arguments(backend, tensors[0], tensors, results, geometry, needed)
    torch.library.opcheck(backward, given)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('inside', ['forward', 'backward'])
def test_autocast_around_one_direction(backend, inside):
    tensors = inputs(backend, (1, 1, 4, 5, 6), 1, torch.float32)
    with torch.autocast(DEVICE[backend], torch.bfloat16, enabled=inside == 'forward'):
        out = local_attention(*tensors, 3, backend=backend)
        grad = torch.randn_like(out)
    with torch.autocast(DEVICE[backend], torch.bfloat16, enabled=inside == 'backward'):
        gradients = torch.autograd.grad(out, tensors, grad)
    copies = [t.to(out.dtype) for t in tensors]
    expected = torch.autograd.grad(local_attention(*copies, 3, backend=backend), copies, grad)
    assert out.dtype == (torch.bfloat16 if inside == 'forward' else torch.float32)
    for ours, other in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, other.float())


@pytest.mark.parametrize('backend', FROM_PYTHON)
@pytest.mark.parametrize('twice', [0, 1, 2])
def test_second_order_gradients_are_refused(backend, twice):
    tensors = inputs(backend, (1, 1, 3, 5, 6), 1)
    out = local_attention(*tensors, 3, backend=backend)
    plain = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
    gradients = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    torch.testing.assert_close(gradients, plain)
    message = rf'local_attention has no second-order gradients \(backend {backend!r}\)'
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(gradients[twice].sum(), tensors)
