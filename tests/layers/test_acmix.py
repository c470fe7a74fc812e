import copy
from pathlib import Path

import pytest
import torch
from devices import device_of, needs_native, needs_triton, slow_if_interpreted
from processes import run_two_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from acmix_mm.layers import ACmix
from acmix_mm.layers.mixed_operator import MIX_MODES
from acmix_mm.layers.mixing_weights import shift_kernel
from acmix_mm.ops import available_backends
from acmix_mm.ops import reference as oracles
from acmix_mm.ops.backends import triton_backend


def load_published(module, tensors, prefix='state/'):
    module.double().load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return module


@pytest.mark.parametrize('stride', [1, 2])
def test_golden(golden, stride):
    """Outputs and all gradients of the published module, from its own state dict."""
    tensors = golden(f'acmix_local_stride{stride}')
    module = load_published(ACmix(32, 32, stride=stride), tensors)
    x = tensors['input'].requires_grad_()
    out = module(x)
    torch.testing.assert_close(out, tensors['output'], rtol=1e-5, atol=1e-5)
    out.backward(tensors['grad_output'])
    gradients = {'input': x.grad, **{n: p.grad for n, p in module.named_parameters()}}
    published = {k.removeprefix('grad/'): v for k, v in tensors.items() if k.startswith('grad/')}
    # The bias of conv_p has no effect: its published gradient is zero, and it does not exist here.
    assert published.pop('conv_p.bias').abs().max() < 1e-6
    assert gradients.keys() == published.keys()
    for name, gradient in gradients.items():
        scale = published[name].abs().max().item()
        torch.testing.assert_close(gradient, published[name], rtol=1e-5, atol=1e-5 * scale)


def straightforward(module: ACmix, x: torch.Tensor) -> torch.Tensor:
    """ACmix from the paper's formulas: no folded kernel, position encoding in every logit."""
    heads, dim, stride, dilation = (
        module.num_heads, module.head_dim, module.stride[0], module.dilation[0],
    )  # fmt: skip
    maps = []
    for name in ('conv1', 'conv2', 'conv3'):
        p = getattr(module, name)
        out = nn.functional.conv2d(x, p['weight'], p['bias'], groups=module.groups)
        maps.append(out.unflatten(1, (heads, dim)))
    query, key, value = maps
    height, width = x.shape[-2:]
    x_axis, y_axis = (
        torch.linspace(-1, 1, size, dtype=torch.float64).to(x) for size in (width, height)
    )
    grid = torch.stack([x_axis.expand(height, width), y_axis[:, None].expand(height, width)])
    position = torch.einsum('dc,chw->dhw', module.conv_p['weight'].flatten(1), grid)
    index = oracles.neighbours(height, width, module.attn_kernel_size, stride, dilation)
    relative = position[:, ::stride, ::stride, None] - position.flatten(1)[:, index]
    queries = query[..., ::stride, ::stride, None]
    logits = (queries * (key.flatten(3)[..., index] + relative)).sum(2) / dim**0.5
    attention = (logits.softmax(-1)[:, :, None] * value.flatten(3)[..., index]).sum(-1)

    mixed = torch.einsum('km,bmdhw->bdkhw', module.fc['weight'].flatten(1), torch.cat(maps, 1))
    kernel_size = module.kernel_size[0]
    convolution = nn.functional.conv2d(
        mixed.flatten(1, 2), module.dep_conv['weight'], None, stride,
        kernel_size // 2 * dilation, dilation, dim,
    )  # fmt: skip
    return module.rate1 * attention.flatten(1, 2) + module.rate2 * convolution


@pytest.mark.parametrize(
    ('size', 'arguments'),
    [
        ((1, 1), {}),
        ((2, 3), {'stride': 2}),
        ((1, 9), {'attn_kernel_size': 5}),
        ((17, 33), {'stride': 2}),
        ((11, 8), {'dilation': 2}),
        ((11, 8), {'dilation': 3, 'stride': 2, 'kernel_size': 5}),
        ((9, 10), {'groups': 4}),
        ((9, 10), {'num_heads': 8}),
        ((6, 6), {'kernel_size': 1}),
    ],
)
def test_equals_the_formulas(size, arguments):
    module = ACmix(8, 16, **arguments).double()
    nn.init.normal_(module.dep_conv['weight'])
    nn.init.normal_(module.conv1['bias'])
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    out = module(x)
    stride = module.stride[0]
    assert out.shape == (2, 16, -(-size[0] // stride), -(-size[1] // stride))
    expected = straightforward(module, x)
    torch.testing.assert_close(out, expected)
    leaves = (x, *module.parameters())
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


def test_mix_modes():
    """Each mode is the learned mix at particular rates; single paths hold no other parameters."""
    x = torch.randn(1, 8, 7, 9)
    learned = ACmix(8, 8)
    rates = {
        'learned': (0.5, 0.5),
        'complementary': (0.3, 0.7),
        'sum': (1, 1),
        'attention': (1, 0),
        'conv': (0, 1),
    }
    assert rates.keys() == set(MIX_MODES)
    for mode, (rate1, rate2) in rates.items():
        module = ACmix(8, 8, mix=mode)
        module.load_state_dict(learned.state_dict(), strict=False)
        with torch.no_grad():
            if mode == 'complementary':
                module.rate1.fill_(rate1)
            learned.rate1.fill_(rate1)
            learned.rate2.fill_(rate2)
        torch.testing.assert_close(module(x), learned(x))
        # DistributedDataParallel refuses parameters without gradient.
        module(x).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters()), mode


def test_initialisation():
    module = ACmix(16, 32)
    assert torch.equal(module.dep_conv['weight'], shift_kernel(32, 8, 3))
    assert module.rate1.item() == module.rate2.item() == 0.5
    assert not module.conv1['bias'].any()
    first, second = (
        (torch.manual_seed(7), ACmix(16, 32).state_dict())[1] for _ in range(2)
    )  # with the same seed a model repeats
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    module, x = ACmix(16, 16).double(), torch.randn(1, 16, 9, 12).double()
    expected = module(x)
    out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float64: 1e-12}[dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * scale)


def test_autocast_trains():
    module, x = ACmix(16, 16), torch.randn(1, 16, 9, 12)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=0, atol=0.1)
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_channels_last():
    module, x = ACmix(16, 16, stride=2), torch.randn(2, 16, 9, 12)
    out = module(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize('backend', slow_if_interpreted(available_backends()))
def test_compiles_as_one_graph(backend):
    module = ACmix(8, 8, backend=backend).to(device_of(backend))
    x = torch.randn(1, 8, 9, 12).to(device_of(backend))
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend='aot_eager')
    compiled(x).square().sum().backward()
    module(x).square().sum().backward()
    for ours, theirs in zip(module.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@needs_triton
@pytest.mark.parametrize('stride', [1, 2])
def test_triton_copies_no_channels_last_maps(stride, monkeypatch):
    """To attention, forward and backward; the result is channels last, too."""
    given, lay_out = [], triton_backend._channels_last
    monkeypatch.setattr(
        triton_backend, '_channels_last', lambda maps: given.append(maps) or lay_out(maps)
    )
    module = ACmix(8, 8, stride=stride, num_heads=2, attn_kernel_size=3, backend='triton')
    x = torch.randn(2, 8, 6, 7).to(device_of('triton'))
    out = module.to(x.device)(x.contiguous(memory_format=torch.channels_last).requires_grad_())
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.square().sum().backward()
    assert len(given) == 4 + 5
    assert all(lay_out(maps) is maps for maps in given)


@pytest.mark.parametrize('backend', available_backends())
def test_exports(backend):
    """With height and width as symbols, into a program that gives the layer's results."""
    module = ACmix(8, 8, stride=2, backend=backend).to(device_of(backend)).eval()
    x = torch.randn(1, 8, 9, 12).to(device_of(backend))
    size = {2: torch.export.Dim('height', min=4), 3: torch.export.Dim('width', min=4)}
    program = torch.export.export(module, (x,), dynamic_shapes=(size,))
    for shape in ((9, 12), (16, 5)):
        x = torch.randn(1, 8, *shape).to(device_of(backend))
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize('backend', available_backends())
def test_checkpointing_gives_the_same_gradients(backend):
    module = ACmix(8, 8, backend=backend).to(device_of(backend))
    x = torch.randn(1, 8, 6, 7).to(device_of(backend))
    parameters = list(module.parameters())
    plain = torch.autograd.grad(module(x).square().sum(), parameters)
    again = checkpoint(module, x, use_reentrant=False).square().sum()
    torch.testing.assert_close(torch.autograd.grad(again, parameters), plain)


@pytest.mark.parametrize('backend', slow_if_interpreted(available_backends()))
def test_distributed_gradients(backend, tmp_path):
    """Two processes with half of the batch each average to the gradients of the whole batch."""
    out = tmp_path / 'gradients.pth'
    program = Path(__file__).with_name('ddp_gradients.py')
    run_two_processes(program, backend, device_of(backend), out)
    torch.manual_seed(0)
    module = ACmix(8, 8)
    module(torch.randn(4, 8, 6, 7)).square().mean().backward()
    for averaged in torch.load(out):
        assert averaged.keys() == dict(module.named_parameters()).keys()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(averaged[name], parameter.grad)


def test_output_bias():
    module, x = ACmix(8, 8, bias=True), torch.randn(1, 8, 5, 6)
    with torch.no_grad():
        before = module(x)
        module.bias += torch.arange(8.0)
    torch.testing.assert_close(
        module(x) - before, torch.arange(8.0).view(8, 1, 1).expand(1, 8, 5, 6)
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'out_channels': 10}, r'out_channels must be divisible by num_heads \(4\), got 10'),
        ({'groups': 3}, r'in_channels must be divisible by groups \(3\), got 8'),
        ({'kernel_size': 2}, 'kernel_size must be a positive odd integer, got 2'),
        ({'kernel_size': (3, 5)}, r'kernel_size must be .* pair of equal integers, got \(3, 5\)'),
        ({'attn_kernel_size': 6}, 'attn_kernel_size must be a positive odd integer, got 6'),
        ({'padding': 0}, "padding must be 'same' or 1 for kernel_size 3 and dilation 1, got 0"),
        ({'num_heads': 0}, 'num_heads must be a positive integer, got 0'),
        ({'stride': -1}, 'stride must be a positive integer, got -1'),
        ({'mix': 'both'}, "mix must be one of .*'learned'.* got 'both'"),
        ({'backend': 'fast'}, "backend must be None or one of .* got 'fast'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmix(**{'in_channels': 8, 'out_channels': 8, **arguments})


@pytest.mark.parametrize('shape', [(8,), (8, 5), (2, 7, 5, 6), (7, 5, 6), (1, 1, 8, 5, 6)])
@pytest.mark.parametrize('num_heads', [4, 8])
def test_wrong_input(shape, num_heads):
    message = r'x must have shape \(B, 8, H, W\) or \(8, H, W\), got \('
    with pytest.raises(ValueError, match=message):
        ACmix(8, 8, num_heads=num_heads)(torch.randn(shape))


@pytest.mark.parametrize('mix', MIX_MODES)
@pytest.mark.parametrize('arguments', [{}, {'stride': 2, 'bias': True}, {'num_heads': 8}])
def test_deploy_form(mix, arguments):
    """Folding, with and without a batch norm, keeps the outputs and the input's gradient."""
    x = torch.randn(2, 16, 9, 12, dtype=torch.float64, requires_grad=True)
    for norm in (None, nn.BatchNorm2d(16).double().eval()):
        layer = ACmix(16, 16, mix=mix, **arguments).double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        expected = layer(x)
        if norm is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            expected = norm(expected)
        grad = torch.randn_like(expected)
        (expected_grad,) = torch.autograd.grad(expected, x, grad)
        layer.switch_to_deploy(norm)
        out = layer(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], expected_grad)
        assert layer.deployed
        assert not any(p.requires_grad for p in layer.parameters())


def test_deploy_refuses_what_it_cannot_fold():
    layer = ACmix(8, 8)
    with pytest.raises(ValueError, match=r'norm must be a batch norm .* got GroupNorm'):
        layer.switch_to_deploy(nn.GroupNorm(2, 8))
    layer.switch_to_deploy()
    with pytest.raises(ValueError, match='norm must be None for an operator that is deployed'):
        layer.switch_to_deploy(nn.BatchNorm2d(8))


@needs_native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('arguments', [{}, {'stride': 2}, {'mix': 'sum', 'dilation': 2}])
def test_fused_operator_equals_its_parts(dtype, arguments):
    """The native backend's operator for all of ACmix against the PyTorch backend's steps."""
    x = torch.randn(2, 16, 13, 18, dtype=torch.float64)
    results = []
    layer = ACmix(16, 16, backend='torch', **arguments).double()
    nn.init.normal_(layer.dep_conv['weight'], std=0.3)
    parts = layer.double()
    fused = copy.deepcopy(layer).to(dtype)
    fused.backend = 'native'
    grad = None
    for module, tensor in ((parts, x.to(dtype).double()), (fused, x.to(dtype))):
        tensor = tensor.requires_grad_()
        out = module(tensor)
        grad = torch.randn_like(out) if grad is None else grad.to(dtype)
        leaves = (tensor, *module.parameters())
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for expected, result in zip(*results, strict=True):
        scale = expected.abs().max().item()
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), expected, rtol=tolerance, atol=tolerance * scale
        )


@needs_native
def test_training_saves_the_input_instead_of_the_projections():
    layer, x = ACmix(16, 16), torch.randn(1, 16, 30, 40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    maps = [t for t in saved if t.shape[-2:] == x.shape[-2:]]
    # The input, and one log-sum-exp a query and head.
    assert sum(t.numel() for t in maps) == x.numel() + layer.num_heads * 30 * 40


@pytest.mark.parametrize('backend', available_backends())
@pytest.mark.parametrize('arguments', [{}, {'stride': 2, 'num_heads': 2}, {'num_heads': 8}])
def test_output_bias_equals_the_formulas(backend, arguments):
    """Where all is one operator and where it is not: eight heads do not fold."""
    dtype = torch.float32 if backend == 'triton' else torch.float64
    module = ACmix(8, 16, bias=True, attn_kernel_size=3, backend=backend, **arguments)
    module.to(device_of(backend), dtype)
    nn.init.normal_(module.dep_conv['weight'])
    nn.init.normal_(module.bias)
    x = torch.randn(1, 8, 7, 6, dtype=dtype).to(device_of(backend)).requires_grad_()
    out = module(x)
    grad = torch.randn_like(out)
    results = (out, *torch.autograd.grad(out, (x, *module.parameters()), grad))
    module, x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    expected = straightforward(module, x) + module.bias.view(-1, 1, 1)
    leaves = (x, *module.parameters())
    exact = (expected, *torch.autograd.grad(expected, leaves, grad.double()))
    for result, value in zip(results, exact, strict=True):
        scale = value.abs().max().item()
        tolerance = torch.finfo(dtype).eps * 64
        torch.testing.assert_close(result.double(), value, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize('backend', available_backends())
@pytest.mark.parametrize('mix', MIX_MODES)
def test_gradient_of_the_output_bias(mix, backend):
    """It is the sum of the output's gradient, whatever the paths."""
    module = ACmix(8, 8, bias=True, num_heads=1, attn_kernel_size=3, mix=mix, backend=backend)
    out = module.to(device_of(backend))(torch.randn(2, 8, 5, 6).to(device_of(backend)))
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(module.bias.grad, grad.sum((0, 2, 3)))


@pytest.mark.parametrize('mix', MIX_MODES)
@pytest.mark.parametrize('bias', [False, True])
def test_deploys_with_a_norm_without_affine(mix, bias):
    layer, norm = ACmix(8, 8, mix=mix, bias=bias), nn.BatchNorm2d(8, affine=False).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(1, 8, 7, 6)
    with torch.no_grad():
        expected = norm(layer(x))
        layer.switch_to_deploy(norm)
        torch.testing.assert_close(layer(x), expected)


def test_deploy_refuses_a_norm_without_statistics():
    with pytest.raises(ValueError, match='norm must be a batch norm with running statistics'):
        ACmix(8, 8).switch_to_deploy(nn.BatchNorm2d(8, track_running_stats=False))
