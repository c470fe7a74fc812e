"""Bare PyTorch models with layers of this package, exported and run by ONNX Runtime."""

import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import acmix_mm
from acmix_mm.layers import ACmix, DepthwiseBlock, PatchACmix, PatchAttention, XVolution


class Net(nn.Module):
    """A user's network: two inputs, one by its name, two outputs."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, image, gain=None):
        x = self.layers(self.stem(image))
        x = self.norm(x if gain is None else x * gain)
        return x, x.mean((2, 3))


NETS = {
    'ACmix': lambda: Net(ACmix(16, 16), nn.ReLU(), ACmix(16, 16, stride=2, attn_kernel_size=3)),
    'ACmix, 8 heads, dilated': lambda: Net(ACmix(16, 16, num_heads=8, dilation=2, bias=True)),
    'ACmix, tensor shifts': lambda: Net(ACmix(16, 16, shift='tensor')),
    'XVolution': lambda: Net(XVolution(16, 16), XVolution(16, 16, attention='local')),
    'patches': lambda: Net(PatchAttention(16, 16, 4, 3), PatchACmix(16, 16, 4, 3)),
    'depth-wise': lambda: Net(nn.Conv2d(16, 32, 1), DepthwiseBlock(32), nn.Conv2d(32, 16, 1)),
}


def run(file, *arguments) -> list[torch.Tensor]:
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    names = [entry.name for entry in session.get_inputs()]
    given = dict(zip(names, (a.numpy() for a in arguments), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, given)]


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n != 'ACmix')) for n in NETS]
)
def test_any_size(name, tmp_path):
    pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
    net, file = NETS[name](), tmp_path / 'net.onnx'
    nn.init.normal_(net.norm.running_mean)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    sizes = {0: Dim('batch'), 2: Dim('height', min=17), 3: Dim('width', min=17)}
    image = torch.randn(2, 3, 24, 38)
    acmix_mm.export_onnx(
        net, (image,), file, dynamic_shapes=(sizes,), input_names=['x'], output_names=['y', 'mean']
    )
    assert net.training
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    net.eval()
    for shape in ((1, 24, 38), (3, 17, 50), (2, 61, 19)):
        image = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            expected = net(image)
        for ours, theirs in zip(run(file, image), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_size_of_a_deployed_model(tmp_path):
    pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
    net, file = acmix_mm.deploy(Net(ACmix(16, 16, mix='sum')).eval()), tmp_path / 'net.onnx'
    image, gain = torch.randn(1, 3, 12, 14), torch.rand(())
    acmix_mm.export_onnx(net, (image,), str(file), kwargs={'gain': gain})
    for ours, theirs in zip(run(file, image, gain), net(image, gain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert net.layers[0].backend is None


@pytest.mark.parametrize('name', ['onnx', 'onnxscript'])
def test_missing_package(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for other in {'onnx', 'onnxscript'} - {name}:
        monkeypatch.setitem(sys.modules, other, sys.modules.get(other, sys))
    message = f'export_onnx needs {name}, which is not installed: pip install onnx onnxscript'
    with pytest.raises(ImportError, match=message):
        acmix_mm.export_onnx(ACmix(8, 8), (torch.randn(1, 8, 5, 5),), tmp_path / 'x.onnx')
    assert not list(tmp_path.iterdir())
