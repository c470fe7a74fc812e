"""float64 stays float64 under autocast, as in PyTorch's own convolutions and products."""

import pytest
import torch
from torch import Tensor, nn

from acmix_mm.layers import ACmix
from acmix_mm.layers.mixing_weights import MixingWeights
from acmix_mm.ops import available_backends, group_conv, local_attention

BACKENDS = [b for b in available_backends() if b != 'triton']  # those that take float64


def assert_same_under_autocast(function, *tensors: Tensor):
    """Output and gradients, in dtype and to float64's precision."""
    tensors = [t.double().requires_grad_() for t in tensors]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = function(*tensors)
    expected = function(*tensors)
    grad = torch.randn_like(expected)
    results = (out, *torch.autograd.grad(out, tensors, grad.to(out.dtype)))
    exact = (expected, *torch.autograd.grad(expected, tensors, grad))
    for result, value in zip(results, exact, strict=True):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('backend', BACKENDS)
def test_local_attention(backend):
    maps = (torch.randn(1, 2, 4, 6, 7) for _ in range(3))
    assert_same_under_autocast(lambda q, k, v: local_attention(q, k, v, 3, backend=backend), *maps)


@pytest.mark.parametrize('backend', BACKENDS)
def test_group_conv(backend):
    tensors = torch.randn(1, 4, 6, 6, 7), torch.randn(8, 6, 3, 3), torch.randn(8)
    assert_same_under_autocast(lambda x, w, b: group_conv(x, w, 1, 1, b, backend), *tensors)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('heads', [2, 8])  # folded, and in two steps
def test_convolution_path(heads, backend):
    dim = 16 // heads
    maps, fc_weight = torch.randn(1, dim, 3 * heads, 6, 7), torch.randn(9, 3 * heads)
    dep_weight, bias, fc_bias = torch.randn(16, 9, 3, 3), torch.randn(16), torch.randn(9)

    def function(maps, kernel, fc, fc_bias, bias):
        weights = MixingWeights(kernel, fc, fc_bias, bias=bias, groups=dim)
        return (weights.folded() if heads == 2 else weights).convolve(maps, backend)

    assert_same_under_autocast(function, maps, dep_weight, fc_weight, fc_bias, bias)


def assert_module_same_under_autocast(module: nn.Module, x: Tensor):
    names, parameters = zip(*module.double().named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    assert_same_under_autocast(function, x, *(nn.init.normal_(p.detach()) for p in parameters))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    'arguments', [{}, {'stride': 2, 'bias': True}, {'num_heads': 8}, {'mix': 'complementary'}]
)
def test_acmix(arguments, backend):
    module = ACmix(8, 16, attn_kernel_size=3, backend=backend, **arguments)
    assert_module_same_under_autocast(module, torch.randn(1, 8, 6, 7))


@pytest.mark.parametrize('backend', BACKENDS)
def test_window_acmix(backend):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    from acmix_mm.layers import WindowACmix

    module = WindowACmix(swin.WindowMSA(12, 3, (3, 3)), backend=backend)
    assert_module_same_under_autocast(module, torch.randn(2, 6, 9, 12))
