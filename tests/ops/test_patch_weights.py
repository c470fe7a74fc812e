import copy

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acmix_mm.ops import available_backends, patch_weights
from acmix_mm.ops.backends import native_backend


def modules(channels, kernel_size, outputs=4, **norm):
    norm = nn.BatchNorm2d(channels * (1 + kernel_size**2), **norm).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if norm.track_running_stats:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm, nn.Conv2d(norm.num_features, outputs, 1, bias=False).double()


def unfolded(query, key, conv, norm, kernel_size, stride, dilation):
    """What the function is defined as, with the patch in memory."""
    index = oracles.neighbours(*key.shape[-2:], kernel_size, stride, dilation)
    patch = key.flatten(2)[..., index].permute(0, 1, 4, 2, 3).flatten(1, 2)
    return conv(norm(torch.cat([query, patch], 1)).relu())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    ('size', 'kernel_size', 'stride', 'dilation', 'norm'),
    [
        ((6, 9), 7, 1, 1, {}),
        ((5, 8), 3, 2, 1, {'momentum': None}),
        ((7, 4), 3, 1, 3, {'eps': 1e-3, 'momentum': 0.3}),
        ((1, 2), 7, 1, 1, {}),
        ((4, 5), 3, 1, 1, {'track_running_stats': False}),
    ],
)
def test_equals_its_definition(size, kernel_size, stride, dilation, norm, training):
    """Outputs, all gradients and running statistics."""
    norm, conv = modules(3, kernel_size, **norm)
    norm.train(training)
    key = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    query = torch.randn_like(key)[..., ::stride, ::stride].contiguous().requires_grad_()
    other = copy.deepcopy(norm)
    inputs = (query, key, conv.weight, norm.weight, norm.bias)
    expected = unfolded(query, key, conv, other, kernel_size, stride, dilation)
    out = patch_weights(query, key, conv.weight, norm, kernel_size, stride, dilation)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    theirs = torch.autograd.grad(
        expected, (query, key, conv.weight, other.weight, other.bias), grad
    )
    torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), theirs)
    assert norm.state_dict().keys() == other.state_dict().keys()
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


@pytest.mark.skipif('native' not in available_backends(), reason='no compiled kernels')
@settings(deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 5),
    outputs=st.integers(1, 35),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_native_patch_weights(batch, channels, outputs, size, kernel_size, stride, dilation, dtype):
    """The kernel for inference, against the definition in float64."""
    norm, conv = modules(channels, kernel_size, outputs)
    norm.eval()
    key = torch.randn(batch, channels, *size, dtype=torch.float64)
    query = torch.randn_like(key)[..., ::stride, ::stride]
    geometry = (kernel_size, stride, dilation)
    with torch.no_grad():
        expected = unfolded(query, key, conv, norm, *geometry)
        norm.to(dtype)
        out = patch_weights(
            query.to(dtype), key.to(dtype), conv.weight.to(dtype), norm, *geometry, 'native'
        )
    assert out.dtype == dtype
    tolerance = {'rtol': 1e-4, 'atol': 1e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(out.double(), expected, **tolerance)


@pytest.mark.skipif('native' not in available_backends(), reason='no compiled kernels')
def test_native_is_taken_for_inference(monkeypatch):
    norm, conv = modules(2, 3)
    norm.eval()
    key = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    calls = []
    kernel = native_backend.patch_weights
    monkeypatch.setattr(native_backend, 'patch_weights', lambda *a: calls.append(a) or kernel(*a))
    patch_weights(key, key, conv.weight, norm, 3)
    assert not calls
    with torch.no_grad():
        ours = patch_weights(key, key, conv.weight, norm, 3)
        assert len(calls) == 1
        plain = patch_weights(key, key, conv.weight, norm, 3, backend='torch')
        patch_weights(key, key, conv.weight, norm.train(), 3)
    assert len(calls) == 1
    torch.testing.assert_close(ours, plain)


def test_training_keeps_nothing_of_the_patchs_size():
    norm, conv = modules(8, 7)
    query, key = (torch.randn(1, 8, 40, 40).double().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        patch_weights(query, key, conv.weight, norm)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    patch = 49 * key.numel() * key.element_size()
    assert sum(sizes.values()) < patch / 5


@pytest.mark.parametrize(
    ('query', 'inputs', 'norm', 'message'),
    [
        ((1, 3, 5, 5), 30, 30, r'query must have shape \(1, 3, 5, 6\)'),
        ((1, 3, 5, 6), 27, 30, 'weight must have 30 input channels'),
        ((1, 3, 5, 6), 30, 27, 'norm must be nn.BatchNorm2d of 30 channels, affine'),
    ],
)
def test_wrong_arguments(query, inputs, norm, message):
    weight, key = torch.zeros(4, inputs, 1, 1), torch.zeros(1, 3, 5, 6)
    with pytest.raises(ValueError, match=message):
        patch_weights(torch.zeros(query), key, weight, nn.BatchNorm2d(norm), 3)


def test_norm_without_scale_is_refused():
    norm, key = nn.BatchNorm2d(30, affine=False), torch.zeros(1, 3, 5, 6)
    with pytest.raises(ValueError, match=r'norm must be nn.BatchNorm2d of 30 channels, affine'):
        patch_weights(key, key, torch.zeros(4, 30, 1, 1), norm, 3)
