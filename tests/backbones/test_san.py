import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.backbones import SAN, ACmixSAN
from acmix_mm.backbones.san import SANBlock
from acmix_mm.layers import PatchAttention

CLASSIFIER = 2048 * 1000 + 1000


def small(family=ACmixSAN, **kwargs):
    torch.manual_seed(0)
    return family(10, base_channels=32, **kwargs)


@pytest.mark.parametrize(
    ('family', 'depth', 'count'),
    [
        (SAN, 10, 11_841_124),
        (SAN, 15, 16_181_310),
        (SAN, 19, 20_518_470),
        (ACmixSAN, 10, 11_994_612),
        (ACmixSAN, 15, 16_414_134),
        (ACmixSAN, 19, 20_829_278),
    ],
)
def test_parameter_count(family, depth, count):
    with torch.device('meta'):
        model = family(depth)
    assert sum(p.numel() for p in model.parameters()) + CLASSIFIER == count


def test_golden_block(golden):
    tensors = golden('san_patchwise_block')
    block = SANBlock(64, PatchAttention(64, 16, 4), with_cp=False).double().eval()
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    block.load_state_dict(state, strict=False)
    missing = set(block.state_dict()) - set(state)
    assert all(name.endswith('num_batches_tracked') for name in missing)
    torch.testing.assert_close(block(tensors['input']), tensors['output'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('family', [SAN, ACmixSAN])
@pytest.mark.parametrize('size', [(64, 96), (17, 33), (1, 1)])
def test_shapes(family, size):
    model = small(family).eval()
    outputs = model(torch.randn(1, 3, *size))
    for i, out in enumerate(outputs):
        stride = 4 * 2**i
        assert out.shape == (1, 128 * 2**i, -(-size[0] // stride), -(-size[1] // stride))


def test_registered():
    assert isinstance(MODELS.build({'type': 'SAN', 'depth': 10}), SAN)
    assert isinstance(MODELS.build({'type': 'ACmixSAN', 'depth': 10, 'mix': 'sum'}), ACmixSAN)


def test_plain_weights_give_the_plain_network():
    plain, mixed = small(SAN).eval(), small().eval()
    result = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {name.split('sam.')[1] for name in result.missing_keys} == {
        'fc.weight', 'dep_conv.weight', 'rate1', 'rate2',
    }  # fmt: skip
    for name, parameter in mixed.named_parameters():
        if name.endswith(('rate1', 'rate2')):
            nn.init.constant_(parameter, float(name.endswith('rate1')))
    x = torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(mixed(x), plain(x))


def test_frozen_stages_and_norm_eval():
    model = small(frozen_stages=2, norm_eval=False)
    model.train()
    for name, module in model.named_modules():
        frozen = name.startswith(('conv_in', 'bn_in')) or any(
            name.startswith((f'conv{i}', f'bn{i}', f'layer{i}')) for i in range(3)
        )
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != frozen
        assert all(p.requires_grad != frozen for p in module.parameters(recurse=False))
    model = small(norm_eval=True)
    model.train()
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_with_cp_gives_the_same_gradients():
    x = torch.randn(2, 3, 32, 40)
    plain, checkpointed = small(norm_eval=False), small(norm_eval=False, with_cp=True)
    for model in (plain, checkpointed):
        model.train()
        sum(out.square().mean() for out in model(x)).backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_deploy_form():
    model = small().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    x = torch.randn(1, 3, 33, 50, dtype=torch.float64)
    expected = model(x)
    model.switch_to_deploy()
    torch.testing.assert_close(model(x), expected)
    model.switch_to_deploy()
    built = small(deploy=True).double()
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built.eval()(x), expected)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'depth': 50}, r'depth must be one of \(10, 15, 19\), got 50'),
        ({'base_channels': 16}, 'base_channels must be a multiple of 32, got 16'),
        ({'out_indices': (4,)}, r'out_indices must be of 0, 1, 2, 3, got \(4,\)'),
        ({'frozen_stages': 5}, 'frozen_stages must be -1 to 4, got 5'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAN(**{'depth': 10, **arguments})
