"""Large numbers in half precision, and memory that does not grow."""

import gc
import resource

import pytest
import torch
from torch import Tensor, nn

import acmix_mm
from acmix_mm.layers import ACmix, PatchACmix
from acmix_mm.ops import available_backends, fused_acmix, local_attention

BACKENDS = [b for b in available_backends() if b != 'triton']
LARGE = 300.0  # of 64 products of two such numbers, a logit is 5.8e6; float16 ends at 65504


def large(*shape: int) -> Tensor:
    return LARGE * torch.randn(shape).sign()


def assert_half_is_exact(function, *tensors: Tensor):
    """In float16, forward and backward: finite, and float64's results, rounded."""
    halves = [t.half().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in halves]
    out, expected = function(*halves), function(*exact)
    assert out.dtype == torch.float16
    grad = torch.randn_like(expected) / LARGE
    ours = torch.autograd.grad(out, halves, grad.half())
    theirs = torch.autograd.grad(expected, exact, grad)
    for result, right in zip((out, *ours), (expected, *theirs), strict=True):
        assert result.isfinite().all()
        bound = 2**-8 * max(1, right.abs().max().item())
        torch.testing.assert_close(result.double(), right, rtol=0, atol=bound)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('scale', [None, 1.0])
def test_logits_beyond_float16(backend, scale):
    """Which differ between keys by more than float16 has numbers for."""
    query, value = large(1, 2, 64, 6, 7), torch.randn(1, 2, 64, 6, 7)
    logits = query.square().sum(2) * (scale or 64**-0.5)
    assert (logits > 65504).all()
    # The query itself is among its keys: one logit is the largest by far.
    assert_half_is_exact(
        lambda *maps: local_attention(*maps, 3, 1, 1, scale, backend), query, query.clone(), value
    )


@pytest.mark.parametrize('backend', BACKENDS)
def test_fused_logits_beyond_float16(backend):
    """Projections of ordinary maps by large weights."""
    heads, dim, inputs = 1, 32, 4
    weight = torch.eye(inputs).repeat(3 * heads * dim // inputs, 1) * LARGE
    tensors = (
        torch.randn(1, inputs, 6, 7), weight.view(-1, inputs, 1, 1),
        torch.zeros(3 * heads * dim), torch.zeros(dim, 2),
        torch.randn(heads * dim, 3 * heads, 3, 3) / LARGE, torch.zeros(heads * dim), torch.ones(1),
    )  # fmt: skip
    halves = [t.half() for t in tensors]
    exact = [t.double() for t in halves]
    out = fused_acmix(*halves, heads, 3, backend=backend)
    expected = fused_acmix(*exact, heads, 3, backend='torch')
    assert out.isfinite().all()
    bound = 2**-7 * expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound)


def window_acmix(dim: int) -> nn.Module:
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    return acmix_mm.layers.WindowACmix(swin.WindowMSA(dim, 1, (7, 7)), mix='attention')


def spatial_reduction_acmix(dim: int) -> nn.Module:
    pvt = pytest.importorskip('mmdet.models.backbones.pvt')
    attention = pvt.SpatialReductionAttention(dim, 1, sr_ratio=1)
    return acmix_mm.layers.SpatialReductionACmix(attention, mix='attention')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('make', [window_acmix, spatial_reduction_acmix])
def test_attention_of_transformers_beyond_float16(make, dtype):
    """Under autocast, with logits of some hundred thousands: finite, with gradients."""
    dim = 64
    layer = make(dim)
    projection = layer.qkv.weight if hasattr(layer, 'qkv') else layer.attn.in_proj_weight
    with torch.no_grad():
        projection[: 2 * dim] = torch.eye(dim).repeat(2, 1) * LARGE
    x = torch.randn(1, 7, 7, dim)
    arguments = (x,) if hasattr(layer, 'qkv') else (x.flatten(1, 2), (7, 7))
    assert (LARGE * x).square().sum(-1).min() * dim**-0.5 > 65504
    with torch.autocast('cpu', dtype):
        out = layer(*arguments)
    assert out.isfinite().all()
    expected = layer(*arguments)
    tolerance = (2**-5 if dtype == torch.bfloat16 else 2**-8) * expected.abs().max().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)
    gradients = torch.autograd.grad(out.float().sum(), list(layer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
def test_detection_size(backend):
    """1333x800, stride 4, in float16: the size that recipes train at, with large logits."""
    query = large(1, 1, 64, 200, 334)
    value = torch.randn(1, 1, 64, 200, 334)
    out = local_attention(query.half(), query.half(), value.half(), backend=backend)
    # The query's own key is the largest by so much that its value is the result.
    torch.testing.assert_close(out.float(), value.half().float(), rtol=0, atol=2**-8)


def resident() -> float:
    """Megabytes that the process has in memory."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
def test_memory_is_flat(backend):
    """Of training on images of changing sizes: 400 iterations more take a few megabytes at most.

    Before, there is one of each size, as oneDNN keeps what it has compiled for each.
    """
    layers = ACmix(8, 16, stride=2, backend=backend), PatchACmix(16, 16, 4, 3, backend=backend)
    model = nn.Sequential(*layers, nn.BatchNorm2d(16))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    sizes = [(height, width) for height in range(20, 40) for width in range(20, 40)]
    measured = []
    for order in (range(400), torch.randint(400, (400,))):
        for index in order:
            model(torch.randn(2, 8, *sizes[index])).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        measured.append(resident())
    assert measured[1] - measured[0] < 8, measured
