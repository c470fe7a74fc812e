import copy
import pickle

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS
from processes import parallel_step
from torch import nn

from acmix_mm.backbones import SAN, ACmixSAN
from acmix_mm.backbones.san import SANBlock
from acmix_mm.layers import PatchACmix, PatchAttention

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


def step(model, x, backwards=1):
    """Outputs, gradients and buffers of a training step."""
    model.train()
    outputs = model(x)
    loss = sum(out.square().mean() for out in outputs)
    for i in range(backwards):
        loss.backward(retain_graph=i < backwards - 1)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return outputs, grads, dict(model.named_buffers())


@pytest.mark.parametrize('family', [SAN, ACmixSAN])
@pytest.mark.parametrize('backwards', [1, 2])
def test_with_cp_gives_the_same_step(family, backwards):
    """Running statistics, too, which the computation anew must not touch."""
    x = torch.randn(2, 3, 32, 40)
    plain, checkpointed = (small(family, norm_eval=False, with_cp=c) for c in (False, True))
    expected = step(plain, x, backwards)
    torch.testing.assert_close(step(checkpointed, x, backwards), expected)
    norms = [m for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.track_running_stats and m.num_batches_tracked == 1 for m in norms)


def test_with_cp_in_evaluation_keeps_the_statistics_in_use():
    x = torch.randn(2, 3, 32, 40)
    plain, checkpointed = (small(norm_eval=True, with_cp=c) for c in (False, True))
    for model in (plain, checkpointed):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.running_var, 2)
    torch.testing.assert_close(step(checkpointed, x), step(plain, x))


def test_checkpointed_block_compiles_as_one_graph():
    plain, block = (SANBlock(128, PatchACmix(128, 32, 8), with_cp=c) for c in (False, True))
    block.load_state_dict(plain.state_dict())
    results = []
    for module in (plain, torch.compile(block, fullgraph=True, backend='aot_eager')):
        x = torch.randn(2, 128, 9, 12, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append((out, x.grad, list(module.buffers())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('family', [SAN, ACmixSAN])
def test_sync_bn_of_one_process_is_bn(family):
    """By norm_cfg, by mmengine's conversion, and converted back."""
    x = torch.randn(2, 3, 32, 40)
    plain = small(family, norm_eval=False)
    synchronised = small(family, norm_eval=False, norm_cfg={'type': 'SyncBN'})
    assert synchronised.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synchronised.modules())
    converted = convert_sync_batchnorm(copy.deepcopy(plain))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    reverted = revert_sync_batchnorm(copy.deepcopy(converted))
    expected = step(plain, x)
    for model in (synchronised, converted, reverted):
        torch.testing.assert_close(step(model, x), expected)
    plain.eval()
    for model in (synchronised, converted, reverted):
        torch.testing.assert_close(model.eval()(x), plain(x))


@pytest.mark.slow
def test_sync_bn_of_two_processes_is_bn_of_the_whole_batch(tmp_path):
    """Outputs, averaged gradients and running statistics, with and without checkpointing."""
    x = torch.randn(4, 3, 24, 20, dtype=torch.float64)
    options = [(SAN, True), (ACmixSAN, False)]
    models = [small(f, norm_eval=False, with_cp=cp).double() for f, cp in options]
    synchronised = [convert_sync_batchnorm(copy.deepcopy(model)) for model in models]
    tasks = [(model, x.chunk(2)) for model in synchronised]
    for model, results in zip(models, parallel_step(tasks, tmp_path), strict=True):
        outputs, grads, buffers = step(model, x)
        for i, expected in enumerate(outputs):
            both = torch.cat([ours['outputs'][i] for ours in results])
            torch.testing.assert_close(both, expected.detach())
        for ours in results:
            torch.testing.assert_close(ours['grads'], grads)
            torch.testing.assert_close(ours['buffers'], buffers)


def test_norm_cfg():
    norm_cfg = {'type': 'BN', 'requires_grad': False, 'momentum': 0.2}
    model = small(norm_cfg=norm_cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.2
            assert not any(p.requires_grad for p in module.parameters())
        else:
            assert all(p.requires_grad for p in module.parameters(recurse=False))
    assert small(norm_cfg={'type': nn.SyncBatchNorm}).bn4.__class__ is nn.SyncBatchNorm


@pytest.mark.parametrize('family', [SAN, ACmixSAN])
def test_pickles(family):
    model, x = small(family).eval(), torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))


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
        ({'norm_cfg': {'type': 'GN'}}, "norm_cfg must be .* BN, BN2d, SyncBN, got .*'GN'"),
        ({'norm_cfg': {'type': 'BN1d'}}, "norm_cfg must be .* got .*'BN1d'"),
        ({'norm_cfg': {'type': 'Nothing'}}, "norm_cfg must be .* got .*'Nothing'"),
        ({'norm_cfg': 'BN'}, "norm_cfg must be .* got 'BN'"),
        ({'norm_cfg': {}}, 'norm_cfg must be .* got {}'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAN(**{'depth': 10, **arguments})
