import pytest
import torch
import torch.nn.functional as F
from devices import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_mm.ops import available_backends, local_aggregation
from acmix_mm.ops import reference as oracles
from acmix_mm.ops.backends import native_backend

BACKENDS = [backend for backend in available_backends() if backend != 'triton']
every_backend = pytest.mark.parametrize('backend', BACKENDS)


def naive(value, weight, kernel_size, stride=1, dilation=1):
    """Unfolded neighbourhoods, in float64."""
    value, weight = value.double(), weight.double()
    index = oracles.neighbours(*value.shape[-2:], kernel_size, stride, dilation)
    groups = torch.arange(value.size(1)) % weight.size(1)
    weights = weight[:, groups].permute(0, 1, 3, 4, 2)
    return (value.flatten(2)[..., index] * weights).sum(-1)


def inputs(channels, groups, size, kernel_size, stride, dtype=torch.float64):
    size_out = [-(-n // stride) for n in size]
    value = torch.randn(2, channels, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, groups, kernel_size**2, *size_out, dtype=dtype, requires_grad=True)
    return value, weight


@every_backend
@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    share=st.integers(1, 20),
    size=st.tuples(st.integers(1, 12), st.integers(1, 40)),
    kernel_size=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
def test_equals_unfolded_sum(backend, groups, share, size, kernel_size, stride, dilation):
    value, weight = inputs(groups * share, groups, size, kernel_size, stride)
    geometry = (kernel_size, stride, dilation)
    out = local_aggregation(value, weight, *geometry, backend=backend)
    expected = naive(value, weight, *geometry)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (value, weight), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (value, weight), grad))


@every_backend
@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
def test_zeros_beyond_the_border(backend, size, kernel_size, stride, dilation):
    value, weight = inputs(4, 2, size, kernel_size, stride)
    geometry = (kernel_size, stride, dilation)
    out = local_aggregation(value, weight, *geometry, 'zeros', backend)
    windows = F.unfold(value, kernel_size, dilation, kernel_size // 2 * dilation, stride)
    windows = windows.view(2, 2, 2, kernel_size**2, *out.shape[-2:])  # c = 2 * i + group
    expected = (windows * weight[:, None]).sum(3).flatten(1, 2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (value, weight), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (value, weight), grad))


@every_backend
@pytest.mark.parametrize('padding_mode', ['reflect', 'zeros'])
@pytest.mark.parametrize(('stride', 'dilation'), [(2, 1), (1, 3)])
def test_gradcheck(backend, padding_mode, stride, dilation):
    torch.autograd.gradcheck(
        lambda v, w: local_aggregation(v, w, 3, stride, dilation, padding_mode, backend),
        inputs(4, 2, (4, 5), 3, stride),
    )


@every_backend
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_rounding_of_each_dtype(dtype, tolerance, backend):
    value, weight = inputs(16, 2, (9, 8), 7, 1, dtype)
    out = local_aggregation(value, weight, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), naive(value, weight, 7), rtol=tolerance, atol=20 * tolerance
    )


def test_opcheck():
    """Schema, fake kernel and autograd registration, as torch.compile needs them."""
    _, weight = inputs(4, 2, (5, 6), 3, 1)
    padded = torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.acmix_mm.local_aggregation.default, (padded, weight, 3, 1, 1))


def test_ones_average_a_constant_map():
    value, weight = torch.full((1, 8, 3, 4), 2.5), torch.full((1, 1, 49, 3, 4), 1 / 49)
    torch.testing.assert_close(local_aggregation(value, weight), value)


@pytest.mark.parametrize(
    ('value', 'weight', 'message'),
    [
        ((1, 8, 3), (1, 1, 49, 3, 4), r'value must have shape \(B, C, H, W\)'),
        ((1, 8, 3, 4), (1, 1, 9, 3, 4), r'weight must have shape \(1, G, 49, 3, 4\)'),
        ((1, 8, 3, 4), (1, 3, 49, 3, 4), 'number of groups that divides 8, got 3'),
    ],
)
def test_wrong_arguments(value, weight, message):
    with pytest.raises(ValueError, match=message):
        local_aggregation(torch.zeros(value), torch.zeros(weight))


def test_wrong_padding_mode():
    with pytest.raises(ValueError, match="padding_mode must be 'reflect' or 'zeros', got 'same'"):
        local_aggregation(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 49, 3, 4), padding_mode='same')


def test_wrong_dtype():
    with pytest.raises(ValueError, match='value and weight must have one dtype'):
        local_aggregation(torch.zeros(1, 8, 3, 4), torch.zeros(1, 1, 49, 3, 4).double())


@every_backend
@pytest.mark.parametrize('result', ['output', 'gradient of value', 'gradient of weight'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype, result, backend):
    """Sums are float32: what comes out is the exact sum, rounded to half precision."""
    tensors = inputs(32, 2, (9, 8), 7, 1, dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    # Zeros beyond the border: gradients of reflected values are summed outside of the operator.
    out, exact = (
        local_aggregation(*pair, padding_mode='zeros', backend=backend)
        for pair in (tensors, doubles)
    )
    if result != 'output':
        leaf = ['gradient of value', 'gradient of weight'].index(result)
        grad = torch.randn_like(out)
        (out,) = torch.autograd.grad(out, tensors[leaf], grad)
        (exact,) = torch.autograd.grad(exact, doubles[leaf], grad.double())
    assert out.dtype == dtype
    # Half a unit in the last place, at most eps / 2 of the result, and float32's own errors.
    rounding = 1.01 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=1e-4)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([(1, 8), (2, 5), (3, 12), (1, 33)]),
    size=st.tuples(st.integers(1, 25), st.integers(1, 70)),
    kernel_size=st.sampled_from([1, 3, 5, 7, 9]),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 5),
    mode=st.sampled_from(['reflect', 'zeros']),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_native_equals_torch(channels, size, kernel_size, stride, dilation, mode, dtype):
    """Results and gradients, by wider vectors than those of float64."""
    groups, share = channels
    tensors = inputs(groups * share, groups, size, kernel_size, stride, dtype)
    results = []
    for backend, leaves in (('native', tensors), ('torch', [t.detach().double() for t in tensors])):
        leaves = [t.requires_grad_() for t in leaves]
        out = local_aggregation(*leaves, kernel_size, stride, dilation, mode, backend)
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype).to(out.dtype))))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        bound = 4 * torch.finfo(dtype).eps + 1e-6 * kernel_size
        torch.testing.assert_close(
            ours.double(), exact, rtol=0, atol=bound * max(1, exact.abs().max().item())
        )


@needs_native
@pytest.mark.parametrize('batch', [1, 3])
def test_native_repeats_bit_for_bit(batch):
    """Two runs, and runs with other numbers of threads."""
    value = torch.randn(batch, 16, 37, 41, requires_grad=True)
    weight = torch.randn(batch, 2, 49, 37, 41, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            out = local_aggregation(value, weight, backend='native')
            results.append((out, *torch.autograd.grad(out.square().sum(), (value, weight))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@needs_native
def test_native_second_order_gradients():
    tensors = inputs(4, 2, (4, 5), 3, 2)
    assert torch.autograd.gradgradcheck(
        lambda v, w: local_aggregation(v, w, 3, 2, backend='native'), tensors
    )


@needs_native
@pytest.mark.parametrize('dilation', [2**31 - 1, 40])
@pytest.mark.parametrize('mode', ['reflect', 'zeros'])
def test_native_takes_any_step(dilation, mode):
    """Reflection is periodic, and zeros are zeros."""
    value, weight = inputs(4, 2, (6, 5), 3, 1)
    out = local_aggregation(value, weight, 3, 1, dilation, mode, 'native')
    if mode == 'zeros':
        expected = value.unflatten(1, (2, 2)) * weight[:, None, :, 4]
        torch.testing.assert_close(out, expected.flatten(1, 2))
    else:
        torch.testing.assert_close(out, naive(value, weight, 3, 1, dilation % 40 + 40))
    weight = weight[..., :1, :1]
    out = local_aggregation(value, weight, 3, 2**31 - 1, 1, mode, 'native')
    torch.testing.assert_close(out, local_aggregation(value, weight, 3, 6, 1, mode, 'torch'))


@needs_native
def test_native_other_pixels_do_not_leak():
    """An infinite pixel reaches its neighbours of its own group only; its gradient likewise."""
    value, weight = torch.randn(2, 4, 9, 21), torch.randn(2, 2, 9, 9, 21)
    value[0, 1, 4, 20] = torch.inf
    value.requires_grad_(), weight.requires_grad_()
    out = local_aggregation(value, weight, 3, backend='native')
    expected = local_aggregation(value, weight, 3, backend='torch')
    assert torch.equal(out.isfinite(), expected.isfinite())
    (ours,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    (theirs,) = torch.autograd.grad(expected, weight, torch.ones_like(out))
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@needs_native
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({0: torch.ones(1, 8, 3)}, 'value must have 4 dimensions'),
        ({0: torch.ones(1, 8, 0, 4)}, 'value must have C, H, W of 1 to'),
        ({0: torch.ones(1, 9, 3, 4)}, 'number of groups that divides 9, got 2'),
        ({0: torch.ones(1, 8, 3, 5)}, r'weight must have shape \[1, 2, 9, 3, 5\]'),
        ({1: torch.ones(1, 2, 9, 3)}, 'weight must have 5 dimensions'),
        ({1: torch.ones(1, 2, 9, 3, 4).double()}, 'weight must be of dtype'),
        ({2: 4}, 'kernel_size must be odd'),
        ({3: 0}, 'stride and dilation must be positive'),
        ({4: -1}, 'stride and dilation must be positive'),
    ],
)
def test_native_refuses(change, message):
    arguments = [torch.ones(1, 8, 3, 4), torch.ones(1, 2, 9, 3, 4), 3, 1, 1, False]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.acmix_mm.local_aggregation_native(*arguments)


@needs_native
def test_native_is_taken(monkeypatch):
    calls = []
    kernel = native_backend.torch.ops.acmix_mm.local_aggregation_native
    monkeypatch.setattr(
        native_backend.torch.ops.acmix_mm,
        'local_aggregation_native',
        lambda *a: calls.append(a) or kernel(*a),
    )
    value, weight = inputs(4, 2, (4, 5), 3, 1)
    local_aggregation(value, weight, 3, backend='torch')
    assert not calls
    local_aggregation(value, weight, 3)
    assert len(calls) == 1
