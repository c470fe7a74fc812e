import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.backbones import ACmixResNet
from acmix_mm.backbones.operator_resnet import OperatorBottleneck
from acmix_mm.layers import ACmix
from acmix_mm.layers.mixing_weights import shift_kernel


def small(**arguments) -> ACmixResNet:
    return ACmixResNet(**{'depth': 26, 'base_channels': 8, **arguments})


# The authors' release with the 1000-way classifier, less conv_p's 464, 704 and 944 biases, which
# have no effect.
@pytest.mark.parametrize(('depth', 'count'), [(26, 10487352), (38, 14410192), (50, 18333032)])
def test_parameter_count(depth, count):
    with torch.device('meta'):
        model, head = ACmixResNet(depth), torch.nn.Linear(2048, 1000)
    assert sum(p.numel() for m in (model, head) for p in m.parameters()) == count


def test_golden_bottleneck(golden):
    tensors = golden('acmix_resnet_bottleneck_stride2')
    downsample = torch.nn.Sequential(
        torch.nn.Conv2d(32, 64, 1, stride=2, bias=False), torch.nn.BatchNorm2d(64)
    )
    block = OperatorBottleneck(32, 16, stride=2, downsample=downsample, operator=ACmix)
    block = block.double().eval()
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    missing, unexpected = block.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith('num_batches_tracked') for name in missing)
    torch.testing.assert_close(block(tensors['input']), tensors['output'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('depth', [26, 38, 50, 101])
@pytest.mark.parametrize('size', [(17, 33), (64, 47)])
def test_shapes(depth, size):
    model = MODELS.build({'type': 'ACmixResNet', 'depth': depth, 'base_channels': 8})
    model.init_weights()
    outs = model(torch.randn(2, 3, *size))
    stem = [-(-s // 4) for s in size]
    for level, out in enumerate(outs):
        assert out.shape == (2, 32 * 2**level, *(-(-s // 2**level) for s in stem))
    assert sum(isinstance(m, ACmix) for m in model.modules()) == sum(model.stage_blocks)


def test_init_weights_keeps_shift_initialisation():
    model = small()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.init_weights()
    for name, layer in model.named_modules():
        if isinstance(layer, ACmix):
            kernel = shift_kernel(layer.out_channels, layer.head_dim, 3)
            assert torch.equal(layer.dep_conv['weight'], kernel), name
    # The rest was initialised: norm3 starts at zero, as in mmdet, and convolutions changed.
    after = dict(model.named_parameters())
    assert not after['layer1.0.bn3.weight'].any()
    assert not torch.equal(after['layer1.0.conv1.weight'], before['layer1.0.conv1.weight'])


def test_out_indices_and_style():
    outs = small(out_indices=(1, 3), style='caffe')(torch.randn(1, 3, 64, 64))
    assert [tuple(o.shape[1:]) for o in outs] == [(64, 8, 8), (256, 2, 2)]
    assert small(style='caffe').layer2[0].conv2.stride == (1, 1)
    assert small().layer2[0].conv2.stride == (2, 2)


def test_dilations():
    model = small(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    assert model.layer4[0].conv2.dilation == (4, 4)
    assert model(torch.randn(1, 3, 64, 64))[-1].shape[-2:] == (8, 8)


def test_frozen_stages_and_norm_eval():
    model = small(frozen_stages=2, norm_eval=True)
    model.train()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(('conv1', 'bn1', 'layer1', 'layer2'))
        assert parameter.requires_grad is not frozen, name
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(m.training for m in norms)
    model = small(norm_eval=False)
    model.train()
    assert all(m.training for m in model.modules())


def test_with_cp_gives_the_same_gradients():
    x = torch.randn(1, 3, 40, 40)
    plain, checkpointed = small(norm_eval=False), small(norm_eval=False, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        model.train()
        model(x.clone().requires_grad_())[-1].square().mean().backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_deep_stem_plugins_norm_and_conv_cfg():
    plugin = {'cfg': {'type': 'ContextBlock', 'ratio': 1 / 4}, 'position': 'after_conv3'}
    model = small(
        deep_stem=True,
        avg_down=True,
        plugins=[plugin],
        norm_cfg={'type': 'GN', 'num_groups': 4},
        conv_cfg={'type': 'ConvWS'},
    )
    assert model(torch.randn(1, 3, 32, 32))[-1].shape == (1, 256, 1, 1)
    assert isinstance(model.layer1[0].conv2, ACmix)


def test_arguments_reach_the_operator():
    layer = small(num_heads=2, attn_kernel_size=5, conv_kernel_size=1, mix='sum', backend='torch')
    layer = layer.layer3[1].conv2
    assert (layer.num_heads, layer.attn_kernel_size, layer.kernel_size) == (2, 5, (1, 1))
    assert (layer.mix, layer.backend) == ('sum', 'torch')


def test_stage_with_acmix():
    model = small(stage_with_acmix=(False, False, True, False))
    mixed = {n.split('.')[0] for n, m in model.named_modules() if isinstance(m, ACmix)}
    assert mixed == {'layer3'}
    plain = ACmixResNet(50, stage_with_acmix=(False,) * 4)
    assert plain.state_dict().keys() == ResNet(50).state_dict().keys()


def test_pretrained_checkpoint(tmp_path):
    """Weights under the release's names, with classifier and conv_p's bias, are taken."""
    model = small()
    state = {f'module.{k}': torch.randn_like(v.float()) for k, v in model.state_dict().items()}
    state |= {'module.fc.weight': torch.ones(5, 256), 'module.fc.bias': torch.ones(5)}
    state['module.layer1.0.conv2.conv_p.bias'] = torch.ones(2)
    torch.save({'state_dict': state}, tmp_path / 'published.pth')
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'published.pth')}
    loaded = small(init_cfg=init_cfg)
    loaded.init_weights()
    for name, value in loaded.named_parameters():
        torch.testing.assert_close(value.detach(), state[f'module.{name}'])

    missing = small(init_cfg={'type': 'Pretrained', 'checkpoint': str(tmp_path / 'none.pth')})
    with pytest.raises(FileNotFoundError, match=r'none\.pth'):
        missing.init_weights()


def randomise_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)


@pytest.mark.parametrize('arguments', [{}, {'conv_cfg': {'type': 'ConvWS'}}, {'mix': 'attention'}])
def test_deploy_form(arguments):
    model = small(**arguments).double()
    randomise_norms(model)
    model.eval()
    x = torch.randn(2, 3, 33, 50, dtype=torch.float64)
    expected = model(x)
    modules = len(list(model.modules()))
    model.switch_to_deploy()
    torch.testing.assert_close(model(x), expected)
    model.switch_to_deploy()
    torch.testing.assert_close(model(x), expected)
    assert len(list(model.modules())) < modules
    if 'conv_cfg' not in arguments:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    built = small(**arguments, deploy=True).double()
    built.load_state_dict(model.state_dict())
    built.eval()
    torch.testing.assert_close(built(x), expected)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'depth': 18}, r'depth must be one of \(26, 38, 50, 101\), got 18'),
        ({'num_heads': 3}, r'out_channels must be divisible by num_heads \(3\), got 8'),
        ({'mix': 'both'}, "mix must be one of .* got 'both'"),
        ({'dcn': {'type': 'DCNv2'}}, 'dcn must be None'),
        ({'stage_with_acmix': (True,)}, 'stage_with_acmix must have a value for each of 4 stages'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
