"""Triton's local aggregation, interpreted where there is no GPU: small maps."""

import pytest
import torch
from devices import device_of, needs_triton

from acmix_mm.ops import local_aggregation
from acmix_mm.ops import reference as oracles

pytestmark = needs_triton

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32


def contiguous(maps):
    return maps


def channels_last(maps):
    return maps.contiguous(memory_format=torch.channels_last)


def make(groups, share, size, kernel_size, stride, dtype=SINGLE, layout=contiguous, batch=1):
    """Value and weight, in a layout, as a convolution of it gives them."""
    out = [-(-n // stride) for n in size]
    shapes = (batch, groups * share, *size), (batch, groups * kernel_size**2, *out)
    value, weight = (layout(torch.randn(s).to(device_of('triton'), dtype)) for s in shapes)
    return value, weight.unflatten(1, (groups, -1))


# Groups, channels of each, size, kernel_size: more groups than lanes next to each other, more
# channels than a program takes, several tiles, maps smaller than the neighbourhood and of one row.
@pytest.mark.parametrize(
    ('layout', 'dtype', 'shape', 'stride', 'dilation', 'mode'),
    [
        (contiguous, SINGLE, (1, 3, (8, 17), 3), 1, 1, 'reflect'),
        (contiguous, SINGLE, (1, 17, (4, 5), 3), 2, 1, 'zeros'),
        (contiguous, HALF, (2, 8, (5, 6), 5), 3, 1, 'reflect'),
        (contiguous, BFLOAT, (1, 2, (1, 3), 3), 1, 2, 'reflect'),
        (channels_last, SINGLE, (17, 1, (3, 4), 3), 1, 2, 'reflect'),
        (channels_last, HALF, (3, 2, (5, 4), 3), 2, 3, 'zeros'),
        (channels_last, BFLOAT, (2, 2, (6, 3), 3), 1, 1, 'reflect'),
    ],
)
def test_equals_the_definition(layout, dtype, shape, stride, dilation, mode):
    """Result and gradients, in the layout of what they are computed from."""
    batch = 2 if mode == 'zeros' else 1
    tensors = [t.requires_grad_() for t in make(*shape, stride, dtype, layout, batch)]
    geometry = (shape[-1], stride, dilation, mode)
    out = local_aggregation(*tensors, *geometry, 'triton')
    right = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = oracles.local_aggregation(*right, *geometry)
    grad = layout(torch.randn(expected.shape).to(out))
    ours = torch.autograd.grad(out, tensors, grad)
    theirs = torch.autograd.grad(expected, right, grad.cpu().double())
    assert out.stride() == layout(torch.empty_like(out)).stride()
    assert ours[1].stride() == tensors[1].stride()
    for result, oracle in zip((out, *ours), (expected, *theirs), strict=True):
        assert result.dtype == dtype
        scale = oracle.abs().max().item()
        allowed = oracles.tolerance(dtype, shape[-1] ** 2 * shape[1], scale)
        torch.testing.assert_close(result.cpu().double(), oracle, rtol=0, atol=allowed)


def test_derivatives_of_gradients():
    tensors = [t.requires_grad_() for t in make(1, 2, (3, 4), 3, 1)]
    grads = [torch.randn(s) for s in ((1, 2, 3, 4), *(t.shape for t in tensors))]

    def second(function, tensors, grads):
        first = torch.autograd.grad(function(*tensors), tensors, grads[0], create_graph=True)
        return [*first, *torch.autograd.grad(first, [*tensors, grads[0]], grads[1:])]

    right = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = second(
        lambda v, w: oracles.local_aggregation(v, w, 3, 1, 1),
        right,
        [g.double().requires_grad_() for g in grads],
    )
    ours = second(
        lambda v, w: local_aggregation(v, w, 3, backend='triton'),
        tensors,
        [g.to(tensors[0]).requires_grad_() for g in grads],
    )
    torch.testing.assert_close([t.cpu().double() for t in ours], expected, rtol=1e-4, atol=1e-4)


def test_other_pixels_do_not_leak():
    value, weight = make(2, 2, (7, 8), 3, 1)
    value[0, 1, 2, 4] = torch.inf
    weight[0, 0, 3, 6, 7] = torch.nan
    tensors = [value.requires_grad_(), weight.requires_grad_()]
    out = local_aggregation(*tensors, 3, backend='triton')
    right = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = oracles.local_aggregation(*right, 3, 1, 1)
    ours = torch.autograd.grad(out, tensors, torch.ones_like(out))
    theirs = torch.autograd.grad(expected, right, torch.ones_like(expected))
    for result, oracle in zip((out, *ours), (expected, *theirs), strict=True):
        assert torch.equal(result.isfinite().cpu(), oracle.isfinite())


@pytest.mark.parametrize('layout', [contiguous, channels_last])
def test_opcheck(layout):
    """Schema, fake kernel and autograd registration, as torch.compile needs them."""
    value, weight = make(2, 2, (2, 3), 3, 1, layout=layout)
    grad = torch.randn_like(value)
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operators = torch.ops.acmix_mm
    for name, arguments in (
        ('local_aggregation_triton', (value, weight, 3, 1, 1, False)),
        ('local_aggregation_triton_grad_value', (grad, weight, 2, 3, 3, 1, 1, True)),
        ('local_aggregation_triton_grad_weight', (grad, value, 2, 3, 1, 1, True)),
    ):
        arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        operator = getattr(operators, name).default
        torch.library.opcheck(operator, tuple(arguments), test_utils=tests)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({0: torch.ones(1, 5, 3, 4)}, 'weight must have groups that divide 5, got 2'),
        ({0: torch.ones(1, 4, 4)}, 'value and weight must have shapes'),
        ({0: torch.ones(1, 4, 3, 4).half()}, 'value and weight must have one dtype'),
        ({1: torch.ones(1, 2, 9, 3, 3)}, r'weight must have shape \(1, 2, 9, 3, 4\)'),
        ({2: 2}, 'kernel_size must be a positive odd integer'),
        ({3: 2**40}, 'stride must be at most'),
    ],
)
def test_hostile_calls(changes, message):
    """Kernels on a GPU read where they are told to."""
    arguments = [torch.ones(1, 4, 3, 4), torch.ones(1, 2, 9, 3, 4), 3, 1, 1, False]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.acmix_mm.local_aggregation_triton(*arguments)


def test_hostile_gradients():
    grad, value, weight = torch.ones(1, 4, 3, 4), torch.ones(1, 4, 5, 6), torch.ones(1, 2, 9, 5, 6)
    operators = torch.ops.acmix_mm
    with pytest.raises(ValueError, match=r'grad must have shape \(1, 4, 5, 6\)'):
        operators.local_aggregation_triton_grad_value(grad, weight, 5, 6, 3, 1, 1, False)
    with pytest.raises(ValueError, match=r'weight must have shape \(1, 2, 9, 5, 6\)'):
        operators.local_aggregation_triton_grad_weight(grad, value, 2, 3, 1, 1, False)
    with pytest.raises(ValueError, match='groups must be a positive integer'):
        operators.local_aggregation_triton_grad_weight(grad, value, 0, 3, 1, 1, False)


def test_empty_batch_and_largest_steps():
    value, weight = (t.requires_grad_() for t in make(1, 2, (2, 3), 3, 1))
    out = local_aggregation(value[:0], weight[:0], 3, backend='triton')
    assert out.shape == (0, 2, 2, 3)
    gradients = torch.autograd.grad(out.sum(), (value, weight))
    assert not any(g.any() for g in gradients)
    largest = 2**31 - 1
    out = local_aggregation(value, weight, 3, 1, largest, 'reflect', 'triton')
    expected = oracles.local_aggregation(value.cpu(), weight.cpu(), 3, 1, largest % 4 + 4)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    out = local_aggregation(value, weight[..., :1, :1], 3, largest, largest, 'zeros', 'triton')
    torch.testing.assert_close(out, value[..., :1, :1] * weight[:, :, 4, :1, :1])
