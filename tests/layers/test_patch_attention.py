import copy

import pytest
import torch
from torch import nn

from acmix_mm.layers import PatchACmix, PatchAttention
from acmix_mm.layers.mixed_operator import MIX_MODES


def test_golden(golden):
    tensors = golden('san_patchwise_module')
    module = PatchAttention(64, 16, 4).double().eval()
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    module.load_state_dict(state, strict=False)
    missing = set(module.state_dict()) - set(state)
    assert all(name.endswith('num_batches_tracked') for name in missing)
    torch.testing.assert_close(module(tensors['input']), tensors['output'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('mix', MIX_MODES)
def test_mix_modes_equal_the_formulas(mix):
    """Both paths, each from its own formula, and the rates of each mode."""
    torch.manual_seed(1)
    module = PatchACmix(32, 32, 8, mix=mix).double().eval()
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    attention = convolution = rate1 = rate2 = 0
    projections = [getattr(module, f'conv{i}')(x) for i in (1, 2, 3)]
    if mix != 'conv':
        plain = PatchAttention(32, 32, 8).double().eval()
        plain.load_state_dict(module.state_dict(), strict=False)
        attention, rate1 = plain(x), 1
    if mix != 'attention':
        query, key, value = projections
        maps = torch.stack([query, key, *value.chunk(4, 1)], 2)  # (B, d, 6, H, W)
        mixed = torch.einsum('km,bdmhw->bdkhw', module.fc['weight'].flatten(1), maps)
        kernel = nn.init.normal_(module.dep_conv['weight'])
        convolution = nn.functional.conv2d(mixed.flatten(1, 2), kernel, padding=1, groups=8)
        rate2 = 1
    if mix in ('learned', 'complementary'):
        nn.init.constant_(module.rate1, 0.3)
        rate1, rate2 = 0.3, 0.7
    if mix == 'learned':
        nn.init.constant_(module.rate2, -2)
        rate2 = -2
    torch.testing.assert_close(module(x), rate1 * attention + rate2 * convolution)
    expected = module(x)
    module.switch_to_deploy()
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((64, 12, 3), 'out_channels must be a multiple of 8, got 12'),
        ((64, 32, 8, 4), 'kernel_size must be a positive odd integer, got 4'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchAttention(*arguments)


def test_wrong_arguments_of_the_mix():
    with pytest.raises(ValueError, match=r'out_channels must be four times qk_channels \(8\)'):
        PatchACmix(64, 16, 8)
    with pytest.raises(ValueError, match=r"mix must be one of .* got 'both'"):
        PatchACmix(64, 32, 8, mix='both')


def test_norm_layer():
    class Norm(nn.BatchNorm2d):
        pass

    for module in (
        PatchAttention(32, 32, 8, norm_layer=Norm),
        PatchACmix(32, 32, 8, norm_layer=Norm),
    ):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [type(m) for m in norms] == [Norm, Norm]
        plain = type(module)(32, 32, 8)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, 32, 5, 6)
        torch.testing.assert_close(module(x), plain(x))


def test_repr():
    module = PatchAttention(64, 32, 8, 5)
    assert repr(module).startswith(
        'PatchAttention(\n  64, 32, qk_channels=8, kernel_size=5, backend=None\n'
    )
    options = {'mix': 'sum', 'shift': 'random', 'kernel_groups': 2}
    module = PatchACmix(64, 32, 8, 5, backend='torch', **options)
    settings = (
        "64, 32, qk_channels=8, attn_kernel_size=5, kernel_size=3, mix='sum', shift='random', "
        "kernel_groups=2, backend='torch'"
    )
    assert f'PatchACmix(\n  {settings}, deployed=False\n' in repr(module)
    module.switch_to_deploy()
    assert f'{settings}, deployed=True\n' in repr(module)


@pytest.mark.parametrize('training', [True, False])
def test_compiles_as_one_graph(training):
    module = PatchACmix(32, 32, 8).double().train(training)
    reference = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 32, 9, 12, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        out, expected = compiled(x), reference(x)
    torch.testing.assert_close(out, expected)
    if training:
        out.square().sum().backward()
        expected.square().sum().backward()
        for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        for ours, theirs in zip(module.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
