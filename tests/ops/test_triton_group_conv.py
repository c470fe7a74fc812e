"""Triton's grouped convolution, interpreted where there is no GPU: small maps."""

import pytest
import torch
import torch.nn.functional as F
from devices import device_of, needs_triton

from acmix_mm.ops import group_conv
from acmix_mm.ops import reference as oracles

pytestmark = needs_triton

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32


def contiguous(maps):
    return maps


def channels_last(maps):
    return maps.contiguous(memory_format=torch.channels_last)


def crop(maps):
    return F.pad(maps, (1, 3, 2, 0), value=torch.nan)[..., 2:, 1:-3]


def make(batch, groups, inputs, outputs, kernel_size, size, dtype=SINGLE):
    shapes = (
        (batch, groups * inputs, *size),
        (groups * outputs, inputs, kernel_size, kernel_size),
        (groups * outputs,),
    )
    return [torch.randn(s).to(device_of('triton'), dtype) for s in shapes]


def convolve(maps, weight, bias, stride, dilation, groups):
    return group_conv(maps.unflatten(1, (groups, -1)), weight, stride, dilation, bias, 'triton')


def exact(maps, weight, bias, stride, dilation, groups):
    return oracles.group_conv(maps.unflatten(1, (groups, -1)), weight, stride, dilation, bias)


# (batch, groups, inputs, outputs, kernel_size, size), stride, dilation: several tiles each way,
# groups, and blocks of input and output channels; maps smaller than the kernel.
@pytest.mark.parametrize(
    ('layout', 'dtype', 'shape', 'stride', 'dilation'),
    [
        (channels_last, HALF, (1, 2, 12, 4, 3, (5, 7)), 1, 1),
        (channels_last, BFLOAT, (1, 2, 3, 3, 3, (5, 6)), 2, 1),
        (channels_last, SINGLE, (2, 1, 12, 4, 3, (9, 17)), 1, 1),
        (channels_last, SINGLE, (1, 1, 33, 34, 1, (3, 17)), 2, 1),
        (contiguous, HALF, (1, 1, 6, 5, 5, (9, 4)), 3, 2),
        (contiguous, BFLOAT, (1, 2, 12, 4, 3, (4, 6)), 1, 3),
        (contiguous, SINGLE, (2, 2, 9, 3, 3, (1, 5)), 2, 5),
        (crop, SINGLE, (1, 2, 2, 2, 3, (4, 5)), 1, 2),
    ],
)
def test_equals_the_definition(layout, dtype, shape, stride, dilation):
    """Result and gradients, in the layout of what they are computed from."""
    maps, weight, bias = make(*shape, dtype)
    tensors = [t.requires_grad_() for t in (layout(maps), weight, bias)]
    geometry = (stride, dilation, shape[1])
    out = convolve(*tensors, *geometry)
    right = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = exact(*right, *geometry)
    last = layout is channels_last
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.preserve_format)
    grad = layout(torch.randn(expected.shape).to(out))
    ours = torch.autograd.grad(out, tensors, grad)
    theirs = torch.autograd.grad(expected, right, grad.cpu().double())
    for result, oracle in zip((out, *ours), (expected, *theirs), strict=True):
        assert result.dtype == dtype
        scale = oracle.abs().max().item()
        allowed = oracles.tolerance(dtype, 9 * shape[2] * grad.numel() // oracle.numel(), scale)
        torch.testing.assert_close(result.cpu().double(), oracle, rtol=0, atol=allowed)


def test_derivatives_of_gradients():
    """All three operators are linear in each tensor, and differentiated by one another."""
    tensors = [t.requires_grad_() for t in make(1, 2, 3, 2, 3, (3, 4))]
    grads = [torch.randn(s) for s in ((1, 4, 2, 2), *(t.shape for t in tensors[:2]))]

    def second(function, tensors, grads):
        out = function(*tensors, 2, 1, 2)
        first = torch.autograd.grad(out, tensors[:2], grads[0], create_graph=True)
        return first, torch.autograd.grad(first, [*tensors[:2], grads[0]], grads[1:])

    right = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = second(exact, right, [g.double().requires_grad_() for g in grads])
    ours = second(convolve, tensors, [g.to(tensors[0]).requires_grad_() for g in grads])
    torch.testing.assert_close(
        [t.cpu().double() for t in (*ours[0], *ours[1])], [*expected[0], *expected[1]],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_other_pixels_and_groups_do_not_leak():
    maps, weight, _ = make(1, 2, 3, 2, 3, (5, 6))
    maps[0, 0, 2, 4] = torch.inf
    weight.requires_grad_()
    out = convolve(maps, weight, None, 1, 1, 2)
    expected = exact(maps.cpu(), weight.cpu(), None, 1, 1, 2)
    assert torch.equal(out.isfinite().cpu(), expected.isfinite())
    (grad_weight,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert grad_weight[2:].isfinite().all()


@pytest.mark.parametrize('layout', [contiguous, channels_last])
def test_opcheck(layout):
    """Schema, fake kernel and autograd registration, as torch.compile needs them."""
    maps, weight, bias = (t.requires_grad_() for t in make(1, 2, 3, 2, 3, (3, 4)))
    maps = layout(maps.detach()).requires_grad_()
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operators = torch.ops.acmix_mm
    grad = layout(torch.randn(1, 4, 3, 4).to(maps))
    for name, arguments in (
        ('group_conv_triton', (maps, weight, bias, 1, 1, 2)),
        ('group_conv_triton_grad_input', (grad, weight, 3, 4, 1, 1, 2)),
        ('group_conv_triton_grad_weight', (grad, maps, 3, 1, 1, 2)),
    ):
        torch.library.opcheck(getattr(operators, name).default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({0: torch.ones(1, 5, 3, 4)}, 'input must have shape .* multiple of 2'),
        ({0: torch.ones(1, 6, 3, 4).half()}, 'input, weight.* must have one dtype'),
        ({1: torch.ones(4, 3, 2, 2)}, r'weight must have shape \(C, 3, k, k\)'),
        ({1: torch.ones(3, 3, 3, 3)}, r'weight must have shape .* a multiple of 2'),
        ({2: torch.ones(3)}, r'bias must have shape \(4,\)'),
        ({3: 0}, 'stride must be a positive integer'),
        ({4: 2**40}, 'dilation must be at most'),
        ({5: -1}, 'groups must be a positive integer'),
    ],
)
def test_hostile_calls(changes, message):
    """Kernels on a GPU read where they are told to."""
    arguments = [torch.ones(1, 6, 3, 4), torch.ones(4, 3, 3, 3), torch.ones(4), 1, 1, 2]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.acmix_mm.group_conv_triton(*arguments)


def test_hostile_gradients():
    grad, maps, weight = torch.ones(1, 4, 3, 4), torch.ones(1, 6, 3, 4), torch.ones(4, 3, 3, 3)
    operators = torch.ops.acmix_mm
    with pytest.raises(ValueError, match=r'grad must have shape \(1, 4, 2, 2\)'):
        operators.group_conv_triton_grad_input(grad, weight, 3, 4, 2, 1, 2)
    with pytest.raises(ValueError, match=r'grad must have shape \(1, 4, 2, 2\)'):
        operators.group_conv_triton_grad_weight(grad, maps, 3, 2, 1, 2)
    with pytest.raises(ValueError, match='groups must be a positive integer'):
        operators.group_conv_triton_grad_weight(grad, maps, 3, 1, 1, 0)


@pytest.mark.parametrize(('inputs', 'outputs', 'taken'), [(2, 64, 1), (1, 4, 0), (3, 65, 0)])
def test_few_channels_a_group(inputs, outputs, taken, monkeypatch):
    """Others are cuDNN's."""
    from acmix_mm.ops.backends import triton_group_conv

    maps, weight, _ = make(1, 2, inputs, outputs, 1, (1, 2))
    kernel, calls = triton_group_conv.group_conv, []
    monkeypatch.setattr(triton_group_conv, 'group_conv', lambda *a: calls.append(a) or kernel(*a))
    out = group_conv(maps.unflatten(1, (2, -1)), weight, backend='triton')
    assert len(calls) == taken
    torch.testing.assert_close(out.cpu().double(), exact(maps.cpu(), weight.cpu(), None, 1, 1, 2))


def test_empty_batch_and_largest_steps():
    maps, weight, bias = (t.requires_grad_() for t in make(1, 1, 2, 2, 3, (3, 4)))
    out = convolve(maps[:0], weight, bias, 1, 1, 1)
    assert out.shape == (0, 2, 3, 4)
    gradients = torch.autograd.grad(out.sum(), (maps, weight, bias))
    assert not any(g.any() for g in gradients)
    out = convolve(maps, weight, None, 2**31 - 1, 2**31 - 1, 1)
    expected = torch.einsum('oi,bi->bo', weight[:, :, 1, 1], maps[:, :, 0, 0])
    torch.testing.assert_close(out[..., 0, 0], expected)
