"""Mixed precision on a CPU: the wrapper, and mmcv's kernels under it."""

import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from acmix_mm.engine import CPUAmpOptimWrapper
from acmix_mm.layers import ACmix

mmcv_ops = pytest.importorskip('mmcv.ops')


def build(model: nn.Module, **options) -> OptimWrapper:
    optimizer = {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9}
    cfg = {'type': 'CPUAmpOptimWrapper', 'optimizer': optimizer, **options}
    return build_optim_wrapper(model, cfg)


def test_step():
    """The product is bfloat16's, weights and their gradients are float32."""
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    wrapper = build(model, accumulative_counts=1, clip_grad={'max_norm': 1.0})
    assert isinstance(wrapper, CPUAmpOptimWrapper)
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().square().mean())
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_state_of_a_gpu_run():
    wrapper = build(nn.Linear(4, 3))
    state = {**wrapper.state_dict(), 'loss_scaler': {'scale': 65536.0}}
    wrapper.load_state_dict(state)
    assert wrapper.get_lr() == {'lr': [0.1]}


@pytest.mark.parametrize('dtype', ['float16', 'float', torch.float16, 3])
def test_dtype(dtype):
    with pytest.raises(ValueError, match=r"optim_wrapper\.dtype must be 'bfloat16' on a CPU, got"):
        build(nn.Linear(4, 3), dtype=dtype)


def test_kernels_of_mmcv_take_bfloat16():
    """NMS and RoIAlign, forward and backward: the results of float32, rounded."""
    build(nn.Linear(1, 1))
    boxes = torch.tensor([[0.0, 0, 8, 8], [1, 1, 8, 8], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.75, 0.25])
    kept, order = mmcv_ops.nms(boxes.bfloat16(), scores.bfloat16(), 0.5)
    torch.testing.assert_close(kept.float(), torch.cat([boxes, scores[:, None]], 1)[[1, 2]])
    assert order.tolist() == [1, 2]
    maps = torch.randn(1, 2, 9, 9).bfloat16().requires_grad_()
    exact = maps.detach().float().requires_grad_()
    regions = torch.tensor([[0.0, 1, 1, 7, 6]])
    results = []
    for tensor in (maps, exact):
        out = mmcv_ops.roi_align(tensor, regions, (3, 3), 1.0, 2)
        assert out.dtype == tensor.dtype
        results.append((out, *torch.autograd.grad(out.sum(), tensor)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.slow
def test_trains_as_float32():
    """A small ACmix classifier of real digits, three seeds: accuracies differ by noise."""
    data = pytest.importorskip('sklearn.datasets').load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target)
    accuracies = {'OptimWrapper': [], 'CPUAmpOptimWrapper': []}
    for kind, results in accuracies.items():
        for seed in range(3):
            torch.manual_seed(seed)
            order = torch.randperm(len(images))
            train, test = order[:1200], order[1200:]
            model = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                ACmix(16, 32, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
                ACmix(32, 32, attn_kernel_size=3), nn.BatchNorm2d(32), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
            )  # fmt: skip
            optimizer = {'type': 'AdamW', 'lr': 3e-3}
            wrapper = build_optim_wrapper(model, {'type': kind, 'optimizer': optimizer})
            for _ in range(150):
                batch = train[torch.randint(len(train), (32,))]
                with wrapper.optim_context(model):
                    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                wrapper.update_params(loss)
            with torch.no_grad():
                hits = model.eval()(images[test]).argmax(1) == labels[test]
            results.append(100 * hits.float().mean().item())
    means = [sum(results) / len(results) for results in accuracies.values()]
    assert min(means) > 90, accuracies
    assert abs(means[0] - means[1]) < 2, accuracies
