import itertools

import pytest
import torch
import torch.nn.functional as F
from devices import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_mm.ops import group_conv
from acmix_mm.ops.backends import native_backend

pytestmark = needs_native

# (B, C, H, W) with other strides than a contiguous tensor's.
LAYOUTS = {
    'contiguous': lambda t: t,
    'channels last': lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    'columns first': lambda t: t.mT.contiguous().mT,
    'batch inside': lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    'every other pixel': lambda t: t.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., ::2, ::2],
    'crop': lambda t: F.pad(t, (3, 2, 1, 1), value=torch.nan)[..., 1:-1, 3:-2],
    'one image': lambda t: t[:1].expand(t.shape),
}


def conv2d(input, weight, bias, stride, dilation, groups):
    padding = weight.size(-1) // 2 * dilation
    # Contiguous, as PyTorch's own gradients are wrong otherwise: test_layouts_change_no_gradient.
    return F.conv2d(input, weight.contiguous(), bias, stride, padding, dilation, groups)


def make(batch, groups, inputs, outputs, kernel_size, size, dtype=torch.float64):
    """Input, weight and bias."""
    shapes = (
        (batch, groups * inputs, *size),
        (groups * outputs, inputs, kernel_size, kernel_size),
        (groups * outputs,),
    )
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def check(tensors, geometry, tolerance):
    """Result and gradients against F.conv2d in float64, within tolerance of the largest value."""
    out = native_backend.group_conv(*tensors, *geometry)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = conv2d(*exact, *geometry)
    assert out.shape == expected.shape
    assert out.dtype == tensors[0].dtype
    assert out.is_contiguous()
    grad = torch.randn(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, [t for t in tensors if t is not None], grad)
    exact = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())
    for result, oracle in zip((out, *gradients), (expected, *exact), strict=True):
        scale = oracle.abs().max().item() if oracle.numel() else 0
        torch.testing.assert_close(result.double(), oracle, rtol=0, atol=tolerance * scale)


@settings(max_examples=200, deadline=None)
@given(
    channels=st.tuples(
        st.integers(0, 3),  # batch
        st.integers(1, 4),  # groups
        st.integers(1, 13),  # input channels of a group
        st.integers(1, 9),  # output channels of a group
    ),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    layout=st.sampled_from(list(LAYOUTS)),
    use_bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_equals_conv2d(channels, kernel_size, size, stride, dilation, layout, use_bias, dtype):
    input, weight, bias = make(*channels, kernel_size, size, dtype)
    input = LAYOUTS[layout](input.detach()).requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    check([input, weight, bias if use_bias else None], (stride, dilation, channels[1]), tolerance)


# (batch, groups, inputs, outputs, kernel_size, size), (stride, dilation): several blocks of rows
# and of columns, several chunks of sums, every width of register tiles.
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('shape', 'stride', 'dilation'),
    [
        ((1, 2, 12, 4, 3, (60, 304)), 1, 1),
        ((1, 2, 12, 4, 3, (61, 303)), 2, 1),
        ((2, 16, 6, 4, 3, (25, 38)), 1, 1),
        ((8, 3, 9, 3, 3, (7, 7)), 1, 1),
        ((3, 1, 2, 2, 5, (70, 140)), 3, 2),
        ((2, 5, 1, 1, 3, (40, 31)), 1, 1),
        ((1, 2, 3, 2, 5, (9, 200)), 1, 9),
        ((1, 1, 2, 3, 3, (5, 181)), 3, 4),
        ((1, 2, 4, 10, 1, (9, 33)), 2, 1),
        ((1, 1, 3, 5, 3, (4, 6)), 7, 1),
        ((1, 1, 3, 5, 3, (4, 6)), 1, 50),
    ],
)
def test_rounding_of_each_dtype(dtype, shape, stride, dilation):
    rounding = {
        torch.float64: 1e-13,
        torch.float32: 1e-5,
        torch.bfloat16: 2**-8,
        torch.float16: 2**-11,
    }
    # A sum in float32 comes before the rounding.
    check(make(*shape, dtype), (stride, dilation, shape[1]), 1.01 * rounding[dtype])


@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (3, 2)])
def test_gradcheck(stride, dilation):
    tensors = make(2, 2, 3, 2, 3, (5, 4))
    assert torch.autograd.gradcheck(
        lambda *t: native_backend.group_conv(*t, stride, dilation, 2), tensors
    )


@pytest.mark.parametrize('use_bias', [True, False])
def test_opcheck(use_bias):
    """Schema, fake kernel and autograd registration, as torch.compile needs them."""
    input, weight, bias = make(2, 2, 3, 2, 3, (6, 5), torch.float32)
    arguments = (input, weight, bias if use_bias else None, 2, 1, 2)
    torch.library.opcheck(torch.ops.acmix_mm.group_conv_native.default, arguments)


def test_compiles_as_one_graph():
    tensors = make(2, 2, 3, 2, 3, (6, 5), torch.float32)

    def loss(*tensors):
        return native_backend.group_conv(*tensors, 1, 1, 2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


@pytest.mark.parametrize('size', [(50, 76), (7, 7)])
def test_repeats_bit_for_bit(size):
    """Two runs, and runs with other numbers of threads."""
    tensors = make(3, 4, 12, 4, 3, size, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            out = native_backend.group_conv(*tensors, 1, 1, 4)
            results.append((out, *torch.autograd.grad(out.square().sum(), tensors[:2])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize('width', [8, 70])
def test_other_pixels_do_not_leak(width):
    """An infinite pixel of one sample and group reaches its neighbours only."""
    input, weight, _ = make(2, 2, 3, 2, 3, (9, width), torch.float32)
    with torch.no_grad():
        input[0, 0, 4, 7] = torch.inf
    out = native_backend.group_conv(input, weight, None, 1, 1, 2)
    expected = conv2d(input, weight, None, 1, 1, 2)
    assert torch.equal(out.isfinite(), expected.isfinite())
    (grad_weight,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert grad_weight[2:].isfinite().all()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'input': torch.ones(2, 6, 0, 5)}, 'C, H, W >= 1'),
        ({'input': torch.ones(2, 5, 4, 5)}, 'multiple of 2 channels'),
        ({'input': torch.ones(2, 6, 4, 5).double()}, 'weight must be of dtype'),
        ({'weight': torch.ones(4, 3, 2, 2)}, 'odd kernel'),
        ({'weight': torch.ones(4, 3, 3, 5)}, r'weight must have shape \[4, 3, 5, 5\]'),
        ({'weight': torch.ones(3, 3, 3, 3)}, 'multiple of 2 output channels'),
        ({'bias': torch.ones(2)}, r'bias must have shape \[4\]'),
        ({'stride': 0}, 'must be positive'),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        'input': torch.ones(2, 6, 4, 5),
        'weight': torch.ones(4, 3, 3, 3),
        'bias': None,
        'stride': 1,
        'dilation': 1,
        'groups': 2,
    }
    with pytest.raises(RuntimeError, match=message):
        native_backend.group_conv(**{**arguments, **change})


@pytest.mark.parametrize('backend', [None, 'torch'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'maps': torch.ones(1, 6, 4, 5)}, r'maps must have shape \(B, d, M, H, W\), got'),
        ({'weight': torch.ones(4, 3, 2, 2)}, r'weight must have shape \(C, 3, k, k\), .* k odd'),
        ({'weight': torch.ones(3, 3, 3, 3)}, r'weight must have shape \(C, 3, k, k\), C a mult'),
        ({'weight': torch.ones(4, 2, 3, 3)}, r'weight must have shape \(C, 3, k, k\), .* got'),
        ({'stride': 0}, 'stride must be a positive integer, got 0'),
    ],
)
def test_wrong_arguments_of_the_front(change, message, backend):
    """The same with every backend."""
    arguments = {'maps': torch.ones(1, 2, 3, 4, 5), 'weight': torch.ones(4, 3, 3, 3)}
    with pytest.raises(ValueError, match=message):
        group_conv(**{**arguments, **change}, backend=backend)


@pytest.mark.parametrize('backend', ['native', 'torch'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('weight_layout', ['contiguous', 'channels last', 'batch inside'])
@pytest.mark.parametrize('batch', [1, 2])
def test_layouts_change_no_gradient(backend, layout, weight_layout, batch):
    """PyTorch's own convolution in groups is wrong for some pairs, in float64 on a CPU."""
    maps, weight, _ = make(batch, 2, 3, 1, 3, (4, 5))
    direction = torch.randn(batch, 2, 4, 5, dtype=torch.float64)
    if layout == 'one image':
        maps = maps[:1].expand(maps.shape)

    def gradients(one, other):
        one, other = (LAYOUTS[k](t.detach()) for k, t in ((one, maps), (other, weight)))
        tensors = one.requires_grad_(), other.requires_grad_()
        out = group_conv(tensors[0].unflatten(1, (2, 3)), tensors[1], backend=backend)
        return torch.autograd.grad(out, tensors, direction)

    torch.testing.assert_close(
        gradients(layout, weight_layout), gradients('contiguous', 'contiguous')
    )


@pytest.mark.parametrize('backend', ['native', 'torch'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('stride', [2, 3, 90])
def test_maps_no_wider_than_the_stride(backend, dtype, kernel_size, stride):
    """PyTorch's own convolution is wrong for them in bfloat16, on CPUs with AMX."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for size in itertools.product([1, 2, 3, 9, 40], [1, 2, 3, 4, 12]):
        maps, weight, bias = make(2, 3, 6, 2, kernel_size, size, dtype)
        for power in range(2, 17):  # what is not written is seen
            torch.full((2**power,), torch.nan, dtype=dtype)
        out = group_conv(maps.unflatten(1, (3, 6)), weight, stride, 1, bias, backend)
        direction = torch.randn(out.shape).to(dtype)
        exact = [t.detach().double().requires_grad_() for t in (maps, weight, bias)]
        expected = conv2d(*exact, stride, 1, 3)
        results = (out, *torch.autograd.grad(out, (maps, weight, bias), direction))
        oracles = (expected, *torch.autograd.grad(expected, exact, direction.double()))
        for result, oracle in zip(results, oracles, strict=True):
            torch.testing.assert_close(result.double(), oracle, rtol=tolerance / 2, atol=tolerance)


def test_groups_are_checked_before_they_are_multiplied():
    """Which overflows for such a number: undefined in C++."""
    grad, weight = torch.randn(1, 4, 5, 6), torch.randn(4, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r'groups must be at least 1 and at most .*, 4, got -'):
        torch.ops.acmix_mm.group_conv_native_grad_input(grad, weight, 5, 6, 1, 1, -(2**63))
