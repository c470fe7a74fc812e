import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import BATCH_NORMS, OtherForward
from torch import nn

from acmix_mm.ops import norm_relu_conv

NORMS = [*BATCH_NORMS, OtherForward]


def make_norm(channels: int = 6, **kwargs) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **kwargs).double()
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if norm.track_running_stats:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def scaled(out: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return out * factor.exp()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('then', [None, scaled])
@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'momentum': None},
        {'momentum': 0.3, 'eps': 1e-2},
        {'affine': False},
        {'track_running_stats': False},
    ],
)
def test_equals_the_modules(arguments, then, training):
    """Outputs, gradients of all inputs and parameters, running statistics."""
    norm = make_norm(**arguments).train(training)
    other = copy.deepcopy(norm)
    conv = nn.Conv2d(6, 4, 1).double()
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    more = () if then is None else (torch.randn(4, 1, 1, dtype=torch.float64, requires_grad=True),)
    expected = conv(F.relu(other(x)))
    if then is not None:
        expected = then(expected, *more)
    out = norm_relu_conv(x, norm, conv.weight, conv.bias, then, *more)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = (x, *conv.parameters(), *more)
    ours = torch.autograd.grad(out, (*inputs, *norm.parameters()), grad)
    theirs = torch.autograd.grad(expected, (*inputs, *other.parameters()), grad)
    torch.testing.assert_close(ours, theirs)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])
    with torch.no_grad():
        expected = F.conv2d(F.relu(other(x)), conv.weight)
        torch.testing.assert_close(norm_relu_conv(x, norm, conv.weight), expected)


@settings(deadline=None)
@given(
    kind=st.sampled_from(NORMS),
    training=st.booleans(),
    affine=st.booleans(),
    bias=st.booleans(),
    tracked=st.booleans(),
    counted=st.booleans(),
    momentum=st.sampled_from([None, 0.3]),
    batch=st.integers(0, 2),
    size=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_any_norm_and_batch(
    kind, training, affine, bias, tracked, counted, momentum, batch, size
):  # fmt: skip
    """As the modules, or refused as by them: one value a channel, where the batch's are taken."""
    options = {'affine': affine, 'track_running_stats': tracked, 'momentum': momentum}
    norm = kind(3, **options).train(training)
    if not bias:
        norm.register_parameter('bias', None)
    if not counted and kind is not nn.SyncBatchNorm:  # whose own forward insists
        norm.num_batches_tracked = None
    other = copy.deepcopy(norm)
    weight = torch.randn(4, 3, 1, 1, requires_grad=True)
    x = torch.randn(batch, 3, *size, requires_grad=True)
    try:
        expected = F.conv2d(F.relu(other(x)), weight)
    except ValueError:
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            norm_relu_conv(x, norm, weight)
        return
    out = norm_relu_conv(x, norm, weight)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, weight, *norm.parameters()), grad)
    theirs = torch.autograd.grad(expected, (x, weight, *other.parameters()), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.state_dict(), other.state_dict())


def test_dimensions_are_checked_as_by_the_norm():
    with pytest.raises(ValueError, match='expected 5D input'):
        norm_relu_conv(torch.zeros(2, 3, 4, 4), nn.BatchNorm3d(3), torch.zeros(4, 3, 1, 1))
    with pytest.raises(ValueError, match=r'x must have shape \(B, 2, H, W\)'):
        norm_relu_conv(torch.zeros(2, 3, 4, 4), nn.BatchNorm2d(2), torch.zeros(4, 3, 1, 1))


def test_statistics_are_those_of_the_forward_pass():
    """Whatever happens to the norm between forward and backward pass, gradients are not wrong."""
    norm, weight = nn.BatchNorm2d(3), torch.randn(4, 3, 1, 1)
    nn.init.uniform_(norm.running_var, 2, 3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(norm_relu_conv(x, norm, weight).square().sum(), x)
    out = norm_relu_conv(x, norm, weight)
    norm.eval()
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], expected)
    out = norm_relu_conv(x, norm, weight)
    norm.running_mean += 1
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.square().sum().backward()


@pytest.mark.parametrize('training', [True, False])
def test_half_precision(training):
    """bfloat16 maps and weights between norms in float32, as autocast and mmengine have it."""
    norm = nn.BatchNorm2d(3).train(training)
    other = copy.deepcopy(norm)
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 3, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    out, expected = norm_relu_conv(x, norm, weight), F.conv2d(other(x).relu(), weight)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, weight, *norm.parameters()), grad)
    theirs = torch.autograd.grad(expected, (x, weight, *other.parameters()), grad)
    torch.testing.assert_close((out, *ours), (expected, *theirs))
    torch.testing.assert_close(norm.state_dict(), other.state_dict())


@pytest.mark.parametrize('where', ['forward', 'backward', 'both'])
def test_autocast(where):
    norm, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    other, weight = copy.deepcopy(norm), torch.randn(4, 3, 1, 1, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=where != 'backward'):
        out = norm_relu_conv(x, norm, weight, None, torch.exp)
        expected = F.conv2d(other(x).relu(), weight).exp()
    assert out.dtype == expected.dtype
    grad = torch.randn_like(out)
    with torch.autocast('cpu', torch.bfloat16, enabled=where != 'forward'):
        ours = torch.autograd.grad(out, (x, weight, *norm.parameters()), grad)
        theirs = torch.autograd.grad(expected, (x, weight, *other.parameters()), grad)
    torch.testing.assert_close((out, *ours), (expected, *theirs))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [None, 0.1])
def test_meta(training, momentum):
    norm = nn.BatchNorm2d(3, momentum=momentum, device='meta').train(training)
    x = torch.empty(2, 3, 4, 5, device='meta', requires_grad=True)
    out = norm_relu_conv(x, norm, torch.empty(4, 3, 1, 1, device='meta'))
    assert out.shape == (2, 4, 4, 5)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_other_norms_are_called():
    norm, conv = nn.GroupNorm(2, 6).double(), nn.Conv2d(6, 4, 1).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    out = norm_relu_conv(x, norm, conv.weight, conv.bias)
    torch.testing.assert_close(out, conv(norm(x).relu()))
    out = norm_relu_conv(x, nn.LazyBatchNorm2d(dtype=torch.float64), conv.weight, conv.bias)
    torch.testing.assert_close(out, conv(nn.BatchNorm2d(6).double()(x).relu()))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', BATCH_NORMS)
def test_training_keeps_the_input_only(kind, training):
    """And what is of a channel's size; the chain as modules keeps the ReLU's output, too."""
    norm, conv = kind(64).double().train(training), nn.Conv2d(64, 256, 1).double()
    x = torch.randn(1, 64, 40, 40, dtype=torch.float64, requires_grad=True)

    def kept(function) -> int:
        sizes = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            function()
        return sum(sizes.values())

    size = x.untyped_storage().nbytes()
    modules = kept(lambda: conv(norm(x).relu()).exp())
    ours = kept(lambda: norm_relu_conv(x, norm, conv.weight, conv.bias, torch.exp))
    assert modules > 5.9 * size
    assert ours < 1.3 * size
