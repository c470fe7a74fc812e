"""What holds for every layer: meta tensors, empty batches, autocast, layouts, forms, names."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import acmix_mm
from acmix_mm.layers import ACmix, DepthwiseBlock, PatchACmix, PatchAttention, XVolution

SIZE = (7, 14)


def window_acmix(**options) -> nn.Module:
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    return acmix_mm.layers.WindowACmix(swin.WindowMSA(16, 4, (7, 7)), **options)


def spatial_reduction_acmix(**options) -> nn.Module:
    pvt = pytest.importorskip('mmdet.models.backbones.pvt')
    attention = pvt.SpatialReductionAttention(16, 4, sr_ratio=2)
    return acmix_mm.layers.SpatialReductionACmix(attention, **options)


MIXED = {
    'ACmix': partial(ACmix, 16, 16),
    'PatchACmix': partial(PatchACmix, 16, 16, 4, 3),
    'WindowACmix': window_acmix,
    'SpatialReductionACmix': spatial_reduction_acmix,
}
# Of the convolution path; random kernels are learned ones with other values.
OPTIONS = {
    'tensor shifts': {'shift': 'tensor'},
    'fixed kernels': {'shift': 'fixed'},
    'one kernel group': {'kernel_groups': 1},
}
LAYERS = {
    **MIXED,
    **{
        f'{name}, {form}': partial(make, **options)
        for name, make in MIXED.items()
        for form, options in OPTIONS.items()
    },
    'ACmix of 8 heads': lambda: ACmix(16, 16, num_heads=8, stride=2),
    'ACmix, attention only': lambda: ACmix(16, 16, mix='attention'),
    'ACmix, convolution only': lambda: ACmix(16, 16, mix='conv', bias=True),
    'PatchAttention': lambda: PatchAttention(16, 16, 4, 3),
    'XVolution': lambda: XVolution(16, 16),
    'XVolution, local attention': lambda: XVolution(16, 16, stride=2, attention='local'),
    'DepthwiseBlock': lambda: DepthwiseBlock(32),
    'DepthwiseBlock, homogeneous': lambda: DepthwiseBlock(32, dynamic='homogeneous'),
    'DepthwiseBlock, inhomogeneous': lambda: DepthwiseBlock(32, dynamic='inhomogeneous'),
}
every_layer = pytest.mark.parametrize('name', LAYERS)


def arguments(name: str, layer: nn.Module, batch: int = 2, **options) -> tuple:
    """Of the layer's forward; the first needs gradients."""
    kind = name.split(',')[0]
    channels = 32 if kind == 'DepthwiseBlock' else 16
    shapes = {
        'WindowACmix': (batch, *SIZE, channels),
        'SpatialReductionACmix': (batch, SIZE[0] * SIZE[1], channels),
    }
    shape = shapes.get(kind, (batch, channels, *SIZE))
    x = torch.randn(shape, requires_grad=True, **options)
    return (x, SIZE) if kind == 'SpatialReductionACmix' else (x,)


@every_layer
def test_meta_tensors(name):
    """Shapes without numbers, forward and backward, as tools that count and plan ask for them."""
    layer = LAYERS[name]()
    expected = layer(*arguments(name, layer))
    layer.to('meta')
    x, *rest = arguments(name, layer, device='meta')
    out = layer(x, *rest)
    assert out.is_meta
    assert out.shape == expected.shape
    out.sum().backward()
    assert x.grad.is_meta
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@every_layer
def test_built_on_meta(name):
    with torch.device('meta'):
        layer = LAYERS[name]()
        out = layer(*arguments(name, layer))
    assert out.is_meta
    assert all(p.is_meta for p in layer.parameters())


@every_layer
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('deployed', [True, False])
def test_empty_batch(name, training, deployed):
    """As nn.Conv2d: an empty result of the right shape, gradients of zeros. A head without RoIs."""
    layer = LAYERS[name]().eval()
    if deployed:
        acmix_mm.deploy(layer)
        layer.requires_grad_()
    layer.train(training)
    expected = layer(*arguments(name, layer))
    x, *rest = arguments(name, layer, batch=0)
    out = layer(x, *rest)
    assert out.shape == (0, *expected.shape[1:])
    gradients = torch.autograd.grad(out.sum(), (x, *layer.parameters()))
    for gradient, tensor in zip(gradients, (x, *layer.parameters()), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@every_layer
@pytest.mark.parametrize('forward_in_autocast', [True, False])
def test_backward_under_another_autocast(name, forward_in_autocast):
    """Autocast around the backward pass only, or around the forward pass only, rounds at most."""
    layer = LAYERS[name]()
    x, *rest = arguments(name, layer)
    leaves = (x, *layer.parameters())
    results = []
    for backward_in_autocast in (forward_in_autocast, not forward_in_autocast):
        with torch.autocast('cpu', torch.bfloat16, enabled=forward_in_autocast):
            out = layer(x, *rest)
        with torch.autocast('cpu', torch.bfloat16, enabled=backward_in_autocast):
            results.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for gradient, expected in zip(*results, strict=True):
        tolerance = 2**-5 * expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance)
    assert all(g.dtype == torch.float32 for g in results[1])


@pytest.mark.parametrize('name', [n for n in LAYERS if 'SpatialReduction' not in n])  # no tokens
def test_channels_last_changes_nothing(name):
    layer = LAYERS[name]().double()
    x, *rest = arguments(name, layer, dtype=torch.float64)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = tuple(layer.parameters())
    results = []
    for tensor in (x, last):
        out = layer(tensor, *rest)
        results.append((out, *torch.autograd.grad(out.square().sum(), (tensor, *leaves))))
    torch.testing.assert_close(*results)


@every_layer
@pytest.mark.parametrize('deployed', [True, False])
def test_forward_mode(name, deployed):
    """Adjoint to the gradients, in evaluation mode: batch norms write to statistics in training."""
    layer = LAYERS[name]().double().eval()
    if deployed:
        acmix_mm.deploy(layer)
    x, *rest = arguments(name, layer, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    point = tuple(t.detach().requires_grad_() for t in (x, *parameters))
    tangents = tuple(torch.randn_like(t) for t in point)

    def function(x, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, weights, (x, *rest))

    # PyTorch's fast attention on CPUs refuses tangents.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(function, point, tangents)
    grad = torch.randn_like(tangent)
    gradients = torch.autograd.grad(function(*point), point, grad)
    total = sum((g * t).sum().item() for g, t in zip(gradients, tangents, strict=True))
    assert (grad * tangent).sum().item() == pytest.approx(total, rel=1e-9)


@every_layer
def test_printed_form(name):
    layer = LAYERS[name]().eval()
    text = repr(layer)
    assert all(f'{key}=' in text for key in ('backend', 'deployed') if hasattr(layer, key))
    if hasattr(layer, 'deployed'):
        assert 'deployed=False' in text
        assert 'deployed=True' in repr(acmix_mm.deploy(layer))


@every_layer
def test_form_of_a_state_dict(name):
    """Each form loads its own only; the other is refused with what to do, also by non-strict."""
    trained, deployed = LAYERS[name]().eval(), acmix_mm.deploy(LAYERS[name]().eval())
    forms = [trained.state_dict(), deployed.state_dict()]
    for layer, state_dict in zip((trained, deployed), forms, strict=True):
        layer.load_state_dict(state_dict)
    if forms[0].keys() == forms[1].keys():
        return
    with pytest.raises(ValueError, match=r"form for training, with '.*acmix_mm\.deploy\(model\)"):
        deployed.load_state_dict(forms[0], strict=False)
    with pytest.raises(ValueError, match=r"form for inference, with '.*deploy=True"):
        trained.load_state_dict(forms[1], strict=False)


def test_backend_of_a_model():
    model = nn.Sequential(ACmix(8, 8), nn.ReLU(), XVolution(8, 8, attention='local'))
    model[1].backend = 'of somebody else'
    assert acmix_mm.set_backend(model, 'torch') is model
    assert (model[0].backend, model[2].attn.backend) == ('torch', 'torch')
    assert model[1].backend == 'of somebody else'
    acmix_mm.set_backend(model, None)
    assert model[0].backend is None

    class Mine(ACmix):
        """A user's."""

    assert acmix_mm.set_backend(Mine(8, 8), 'torch').backend == 'torch'
    with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'fast'"):
        acmix_mm.set_backend(model, 'fast')


def test_a_backend_of_another_machine_is_accepted_when_built():
    for backend in ('torch', 'native', 'triton'):
        assert ACmix(8, 8, backend=backend).backend == backend


def test_norm_without_statistics_stays():
    """It takes those of the batch in evaluation mode, too, so that it cannot be folded."""

    class Block(nn.Module):
        operator_norms = {'conv': 'norm'}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.conv, self.norm = ACmix(8, 8), nn.BatchNorm2d(8, track_running_stats=False)

        def forward(self, x):
            return self.norm(self.conv(x))

    block, x = Block().eval(), torch.randn(2, 8, 5, 6)
    expected = block(x)
    acmix_mm.deploy(block)
    assert block.conv.deployed
    assert isinstance(block.norm, nn.BatchNorm2d)
    torch.testing.assert_close(block(x), expected)


STAND_INS = {name: LAYERS[name] for name in ('ACmix', 'XVolution', 'XVolution, local attention')}


@pytest.mark.parametrize('name', STAND_INS)
def test_input_without_a_batch(name):
    """As nn.Conv2d takes it."""
    layer = STAND_INS[name]().eval()
    x = torch.randn(16, *SIZE)
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize('kind', [ACmix, XVolution])
def test_device_and_dtype(kind):
    """As nn.Conv2d takes them, which torch.nn.utils.skip_init builds on."""
    for options in ({}, {'shift': 'fixed'}) if kind is ACmix else ({},):
        layer = kind(8, 8, device='meta', dtype=torch.float64, **options)
        tensors = [*layer.parameters(), *layer.buffers()]
        assert all(t.is_meta for t in tensors)
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    layer = kind(8, 8, dtype=torch.bfloat16)
    assert layer(torch.randn(1, 8, 5, 6).bfloat16()).dtype == torch.bfloat16
    layer = nn.utils.skip_init(kind, 8, 8)
    layer.load_state_dict(kind(8, 8).state_dict())
    with pytest.raises(TypeError, match='floating point'):
        kind(8, 8, dtype=torch.int8)


class Block(nn.Module):
    """An operator and its norm, which acmix_mm.deploy is told of."""

    operator_norms = {'conv': 'norm'}  # noqa: RUF012

    def __init__(self, operator: nn.Module):
        super().__init__()
        self.conv, self.norm = operator, nn.BatchNorm2d(16)

    def forward(self, x):
        return self.norm(self.conv(x))


FOLDING = {
    name: make for name, make in LAYERS.items() if name.startswith(('ACmix', 'PatchACmix', 'XVol'))
}


@pytest.mark.parametrize('name', FOLDING)
def test_folded_norm_loads(name):
    """Into an operator that is deployed without its norm, by one line, or with it."""
    block = Block(FOLDING[name]()).eval()
    for values in (block.norm.running_mean, block.norm.weight, block.norm.bias):
        nn.init.normal_(values)
    x, *rest = arguments(name, block.conv)
    with torch.no_grad():
        expected = block(x)
    state_dict = acmix_mm.deploy(block).conv.state_dict()
    layer = acmix_mm.deploy(FOLDING[name]())
    layer.load_state_dict(state_dict)
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(layer.eval()(x, *rest), expected, rtol=1e-4, atol=tolerance)
    assert not any(p.requires_grad for p in layer.parameters())
    other = acmix_mm.deploy(Block(FOLDING[name]()))
    other.load_state_dict(block.state_dict())


def test_weights_of_other_channels_are_no_folded_norm():
    for channels in ((32, 32), (8, 16)):
        state_dict = acmix_mm.deploy(ACmix(*channels, bias=True)).state_dict()
        with pytest.raises(RuntimeError, match=r'(size mismatch for|Unexpected key)'):
            acmix_mm.deploy(ACmix(16, 16)).load_state_dict(state_dict)
