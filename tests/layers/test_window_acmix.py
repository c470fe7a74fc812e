import copy

import pytest
import torch
from devices import device_of
from saved_tensors import saved_bytes
from torch import nn

from acmix_mm.layers import WindowACmix, window_acmix
from acmix_mm.layers.mixed_operator import MIX_MODES
from acmix_mm.layers.mixing_weights import shift_kernel
from acmix_mm.ops import available_backends

WindowMSA = pytest.importorskip('mmdet.models.backbones.swin').WindowMSA


def build(embed_dims=12, num_heads=3, window_size=(3, 3), qkv_bias=True, **arguments):
    plain = WindowMSA(embed_dims, num_heads, window_size, qkv_bias)
    nn.init.normal_(plain.relative_position_bias_table)
    return WindowACmix(plain, **arguments)


@pytest.mark.parametrize('name', ['plain', 'masked'])
def test_golden(golden, name):
    tensors = golden(f'acmix_window_{name}')
    module = build(48, 3, (7, 7)).double()
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert missing == ['relative_position_index']  # a constant
    assert not unexpected
    out = module(tensors['input'], tensors.get('mask'))
    torch.testing.assert_close(out, tensors['output'], rtol=1e-5, atol=1e-5)


def straightforward(module: WindowACmix, x: torch.Tensor, mask=None, unshift=0) -> torch.Tensor:
    """The operator from the paper's formulas, one window and head after the other."""
    batch, height, width, _ = x.shape
    rows, cols = module.window_size
    heads, dim = module.num_heads, module.head_dim
    qkv = (x @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)).view(
        batch, height, width, 3, heads, dim
    )
    pixels = [(y, x) for y in range(rows) for x in range(cols)]
    attention = torch.empty_like(x).unflatten(-1, (heads, dim))
    for window in range(height // rows * (width // cols)):
        top = window // (width // cols) * rows
        left = window % (width // cols) * cols
        area = (slice(None), slice(top, top + rows), slice(left, left + cols))
        for head in range(heads):
            query, key, value = (qkv[area][..., i, head, :].flatten(1, 2) for i in range(3))
            logits = query @ key.transpose(1, 2) / dim**0.5
            for i, (y, x_) in enumerate(pixels):
                for j, (v, u) in enumerate(pixels):
                    row = (y - v + rows - 1) * (2 * cols - 1) + x_ - u + cols - 1
                    logits[:, i, j] += module.relative_position_bias_table[row, head]
            if mask is not None:
                logits = logits + mask[window]
            attention[area][..., head, :] = (logits.softmax(-1) @ value).unflatten(1, (rows, cols))
    attention = attention.flatten(3) @ module.proj.weight.T + module.proj.bias

    maps = qkv.roll((unshift, unshift), (1, 2)).flatten(3, 4)
    mixed = torch.einsum('km,bhwmd->bdkhw', module.fc['weight'].flatten(1), maps)
    mixed = (mixed + module.fc['bias'].view(-1, 1, 1)).flatten(1, 2)
    kernel = module.dep_conv['weight']
    convolution = nn.functional.conv2d(mixed, kernel, padding=kernel.size(-1) // 2, groups=dim)
    attention = attention.roll((unshift, unshift), (1, 2))
    return module.rate1 * attention + module.rate2 * convolution.permute(0, 2, 3, 1)


# Three heads of 4: fc is folded; six of 2: it is not.
@pytest.mark.parametrize('num_heads', [3, 6])
@pytest.mark.parametrize(
    ('arguments', 'masked', 'unshift'),
    [
        ({}, False, 0),
        ({'window_size': (2, 3)}, True, 0),
        ({'kernel_size': 5}, True, 1),
        ({'kernel_size': 1, 'qkv_bias': False}, False, 2),
    ],
)
def test_equals_the_formulas(num_heads, arguments, masked, unshift):
    module = build(num_heads=num_heads, **arguments).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    rows, cols = module.window_size
    x = torch.randn(2, 2 * rows, 3 * cols, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(6, rows * cols, rows * cols, dtype=torch.float64) if masked else None
    out = module(x, mask, unshift)
    expected = straightforward(module, x, mask, unshift)
    torch.testing.assert_close(out, expected)
    leaves = (x, *module.parameters())
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


def test_both_ways_of_convolution_are_tested():
    assert build(num_heads=3).folds
    assert not build(num_heads=6).folds


@pytest.mark.parametrize('qk_scale', [None, 0.3])
def test_equals_plain_attention(qk_scale):
    plain = WindowMSA(12, 3, (3, 3), qk_scale=qk_scale).double()
    nn.init.normal_(plain.relative_position_bias_table)
    module = WindowACmix(plain).double()
    nn.init.ones_(module.rate1)
    nn.init.zeros_(module.rate2)
    x = torch.randn(2, 3, 3, 12, dtype=torch.float64)  # windows of one each
    mask = torch.randn(1, 9, 9, dtype=torch.float64)
    for m in (None, mask):
        torch.testing.assert_close(module(x, m).flatten(1, 2), plain(x.flatten(1, 2), m))


def test_mix_modes():
    """Each mode is the learned mix at particular rates; single paths hold no other parameters."""
    x = torch.randn(1, 6, 6, 12)
    learned = build()
    rates = {
        'learned': (0.5, 0.5),
        'complementary': (0.3, 0.7),
        'sum': (1, 1),
        'attention': (1, 0),
        'conv': (0, 1),
    }
    assert rates.keys() == set(MIX_MODES)
    for mode, (rate1, rate2) in rates.items():
        module = build(mix=mode)
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
    module = build(kernel_size=5)
    assert torch.equal(module.dep_conv['weight'], shift_kernel(12, 4, 5))
    assert module.rate1.item() == module.rate2.item() == 0.5
    assert module.fc['bias'].shape == (25,)
    assert 0 < module.fc['bias'].abs().max() <= 1 / 3  # 1 / sqrt(9 maps)


@pytest.mark.parametrize('name', ['attn_drop', 'proj_drop'])
def test_dropout(name):
    """Of the attention path, in training."""
    module = WindowACmix(WindowMSA(12, 3, (3, 3), **{f'{name}_rate': 0.5}))
    x = torch.randn(1, 6, 6, 12)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize('mix', MIX_MODES)
@pytest.mark.parametrize('num_heads', [3, 6])
def test_deploy_form(mix, num_heads):
    module = build(num_heads=num_heads, mix=mix).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
    expected = module(x)
    module.switch_to_deploy()
    torch.testing.assert_close(module(x), expected)
    module.switch_to_deploy()
    torch.testing.assert_close(module(x), expected)
    assert not any(p.requires_grad for p in module.parameters())
    assert not {'fc.weight', 'dep_conv.weight', 'rate1', 'rate2'} & module.state_dict().keys()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    module, x = build(), torch.randn(1, 6, 6, 12)
    mask = torch.zeros(4, 9, 9)
    expected = module(x)
    with torch.autocast('cpu', dtype=dtype):
        out = module(x, mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    out = copy.deepcopy(module).to(dtype)(x.to(dtype), mask.to(dtype))
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)


def test_compiles_as_one_graph():
    module, x = build(), torch.randn(1, 6, 6, 12)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend='aot_eager')
    compiled(x).square().sum().backward()
    module(x).square().sum().backward()
    for ours, theirs in zip(module.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_heads': 5}, r'embed_dims must be divisible by num_heads \(5\), got 12'),
        ({'kernel_size': 2}, 'kernel_size must be a positive odd integer, got 2'),
        ({'mix': 'both'}, "mix must be one of .*'learned'.* got 'both'"),
        ({'backend': 'fast'}, "backend must be None or one of .* got 'fast'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_deploy_refuses_a_norm():
    with pytest.raises(ValueError, match='norm must be None'):
        build().switch_to_deploy(nn.BatchNorm2d(12))


@pytest.mark.parametrize('masked', [False, True])
def test_saves_no_more_than_the_plain_operator(masked):
    plain = WindowMSA(96, 3, (7, 7))
    module = WindowACmix(copy.deepcopy(plain))
    x = torch.randn(2, 56, 56, 96, requires_grad=True)
    windows = x.detach().view(-1, 49, 96).requires_grad_()  # as many
    mask = torch.randn(64, 49, 49) if masked else None
    ours, theirs = saved_bytes(lambda: module(x, mask)), saved_bytes(lambda: plain(windows, mask))
    # Ours also keeps, of the caller's, the mask.
    assert ours < 1.05 * theirs + (mask.nbytes if masked else 0)


@pytest.mark.parametrize('backend', [b for b in available_backends() if b != 'triton'])
def test_gradient_penalty(backend):
    """Second-order gradients, of a penalty on the input's gradient, by finite differences.

    In float64, which Triton's kernels do not take.
    """
    module = build(backend=backend).double().to(device_of(backend))
    x = torch.randn(1, 6, 9, 12, dtype=torch.float64).to(device_of(backend)).requires_grad_()

    def penalty() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(penalty(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        flat, step = parameter.data.view(-1), 1e-5
        values = []
        for move in (step, -2 * step):
            flat[0] += move
            values.append(penalty().item())
        flat[0] += step
        expected = (values[0] - values[1]) / (2 * step)
        scale = 1 + abs(expected)
        assert abs(gradient.flatten()[0].item() - expected) < 1e-4 * scale, name


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('needed', ['both', 'maps', 'bias'])
def test_gradients_of_window_attention(masked, needed):
    """Of the form that cuts windows anew, of first and second order, by finite differences."""
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 3, 2, 4, 4, dtype=torch.float64, requires_grad=needed != 'bias')
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=needed != 'maps')
    mask = torch.randn(4, 4, 4, dtype=torch.float64) if masked else None
    function = window_acmix._WindowAttention.apply
    assert torch.autograd.gradcheck(function, (maps, bias, mask, (2, 2), 0.7))
    assert torch.autograd.gradgradcheck(function, (maps, bias, mask, (2, 2), 0.7))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_window_attention_of_either_form(dtype):
    """PyTorch's attention and the form for training agree within the dtype's rounding."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 8, 3, 2, 6, 4), torch.randn(2, 4, 4)]
    mask, results = torch.randn(6, 4, 4), []
    for form in (window_acmix._window_attention, window_acmix._WindowAttention.apply):
        inputs = [t.to(dtype).requires_grad_() for t in tensors]
        out = form(*inputs, mask.to(dtype), (2, 2), 0.3)
        out = out[0] if isinstance(out, tuple) else out
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 10 * torch.finfo(dtype).eps
