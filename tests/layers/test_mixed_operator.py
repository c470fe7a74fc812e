"""Operators that project channel-last maps, with the products of either library."""

import copy

import pytest
import torch
from devices import needs_native, needs_onednn

from acmix_mm.layers import SpatialReductionACmix, WindowACmix
from acmix_mm.ops import _products

backbones = pytest.importorskip('mmdet.models.backbones')


def window():
    return WindowACmix(backbones.swin.WindowMSA(12, 3, (3, 3))), lambda m, x: m(x)


def spatial_reduction():
    attention = backbones.pvt.SpatialReductionAttention(12, 3, sr_ratio=2)
    return SpatialReductionACmix(attention), lambda m, x: m(x.flatten(1, 2), x.shape[1:3])


@needs_native
@needs_onednn
@pytest.mark.parametrize('onednn', [False, True])
@pytest.mark.parametrize('build', [window, spatial_reduction])
def test_equals_float64(build, onednn, monkeypatch):
    """Inference, gradients, and gradients of gradients; oneDNN has a part in the first two."""
    multiplied, by_onednn = [], _products._by_onednn
    monkeypatch.setattr(torch.ops.acmix_mm, 'native_onednn_products_pay', lambda: onednn)
    monkeypatch.setattr(
        _products, '_by_onednn', lambda *tensors: multiplied.append(tensors) or by_onednn(*tensors)
    )
    ours, call = build()
    results = []
    for module in (ours, copy.deepcopy(ours).double()):
        torch.manual_seed(0)
        x = torch.randn(2, 6, 12, 12).to(next(module.parameters()).dtype).requires_grad_()
        leaves = (x, *module.parameters())
        with torch.no_grad():
            results.append([call(module, x)])
        inference = len(multiplied)
        out = call(module, x)
        loss = (out * torch.arange(out.numel(), dtype=x.dtype).cos().view_as(out)).sum()
        results[-1] += torch.autograd.grad(loss, leaves, retain_graph=True)
        if module is ours:
            assert (inference > 0, len(multiplied) > inference) == (onednn, onednn)
        (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
        second = torch.autograd.grad(
            of_x.square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        results[-1] += second
    for result, expected in zip(*results, strict=True):
        limit = 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=limit)
