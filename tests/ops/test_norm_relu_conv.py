import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acmix_mm.ops import norm_relu_conv


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


def test_other_norms_are_called():
    norm, conv = nn.GroupNorm(2, 6).double(), nn.Conv2d(6, 4, 1).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    out = norm_relu_conv(x, norm, conv.weight, conv.bias)
    torch.testing.assert_close(out, conv(norm(x).relu()))


@pytest.mark.parametrize('training', [True, False])
def test_training_keeps_the_input_only(training):
    """And what is of a channel's size; the chain as modules keeps the ReLU's output, too."""
    norm, conv = make_norm(64).train(training), nn.Conv2d(64, 256, 1).double()
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
