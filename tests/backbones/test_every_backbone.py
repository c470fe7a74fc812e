"""What holds for every backbone: meta tensors, train and eval, Inductor, the registry."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from parallel_step import mean_gradients
from processes import parallel_step
from torch import nn

import acmix_mm
from acmix_mm import backbones
from acmix_mm.layers import MixedOperator
from acmix_mm.layers.mixed_operator import MIX_MODES
from acmix_mm.layers.x_volution import ATTENTIONS

# A small one of each family, for images of 64 x 64.
SMALL = {
    'ACmixResNet': {'depth': 26, 'base_channels': 16},
    'SAN': {'depth': 10, 'base_channels': 32},
    'ACmixSAN': {'depth': 10, 'base_channels': 32},
    'ACmixPyramidVisionTransformer': {
        'embed_dims': 16, 'num_layers': [1, 1, 1, 1], 'num_heads': [1, 2, 2, 4],
        'pretrain_img_size': 64, 'drop_path_rate': 0.0,
    },
    'ACmixSwinTransformer': {
        'embed_dims': 24, 'depths': (2, 2, 1, 1), 'num_heads': (1, 2, 4, 8), 'drop_path_rate': 0.0,
    },
    'XVolutionResNet': {'depth': 18, 'base_channels': 16},
    'DWNet': {
        'arch': {'embed_dims': 32, 'depths': (1, 1, 1, 1)}, 'dynamic': 'inhomogeneous',
        'drop_path_rate': 0.0,
    },
}  # fmt: skip
# What makes them smaller, where the class allows it: compiling takes a while for every block.
TWO_STAGES = {
    'ACmixResNet': {
        'num_stages': 2, 'strides': (1, 2), 'dilations': (1, 1), 'out_indices': (0, 1),
    },
    'ACmixPyramidVisionTransformer': {
        'num_stages': 2, 'num_layers': [1, 1], 'num_heads': [1, 2], 'patch_sizes': [4, 2],
        'strides': [4, 2], 'paddings': [0, 0], 'sr_ratios': [8, 4], 'mlp_ratios': [8, 8],
        'out_indices': (0, 1),
    },
    'ACmixSwinTransformer': {'depths': (2, 1), 'num_heads': (1, 2), 'out_indices': (0, 1)},
}  # fmt: skip
MIXED = ('ACmixResNet', 'ACmixSAN', 'ACmixPyramidVisionTransformer', 'ACmixSwinTransformer')
# Of the convolution path; random kernels are learned ones with other values.
OPTIONS = {
    'tensor shifts': {'shift': 'tensor'},
    'fixed kernels': {'shift': 'fixed'},
    'one kernel group': {'kernel_groups': 1},
}
FORMS = [f'{name}, {form}' for name in MIXED for form in OPTIONS]
every_backbone = pytest.mark.parametrize('name', SMALL)
every_form = pytest.mark.parametrize('name', [*SMALL, *FORMS])


def build(name: str, **more) -> nn.Module:
    """A small backbone by its class's name, and a form of the convolution path if there is one."""
    name, _, form = name.partition(', ')
    return getattr(backbones, name)(**{**SMALL[name], **OPTIONS.get(form, {}), **more})


def test_all_are_here():
    assert set(SMALL) == set(backbones.__all__) == set(acmix_mm.openmmlab.BACKBONES)


@every_backbone
def test_registered(name):
    assert MODELS.get(name) is getattr(backbones, name)


@every_backbone
def test_train_and_eval_return_the_module(name):
    model = build(name)
    assert model.train() is model
    assert model.training
    assert model.eval() is model
    assert not model.training


@every_form
def test_meta_tensors(name):
    model = build(name)
    image = torch.randn(2, 3, 64, 64)
    shapes = [out.shape for out in model(image)]
    outputs = model.to('meta')(image.to('meta'))
    assert [out.shape for out in outputs] == shapes
    sum(out.sum() for out in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', [*MIXED, *FORMS])
def test_deploys(name):
    """Within rounding, with kernels of no special values."""
    model = build(name).eval()
    for parameter in (p for n, p in model.named_parameters() if 'dep_conv' in n or '.fc.' in n):
        nn.init.normal_(parameter, std=0.1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        names = model.state_dict().keys()
        outputs = acmix_mm.deploy(model)(image)
    assert any('shift_kernel' in n for n in names) == ('shifts' in name or 'fixed' in name)
    assert not any('shift_kernel' in n or 'dep_conv' in n for n in model.state_dict())
    for out, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


@pytest.mark.parametrize('name', MIXED)
def test_shift_and_kernel_groups_reach_every_operator(name):
    for options in ({'shift': 'random', 'kernel_groups': 1}, {'shift': 'tensor'}):
        operators = [m for m in build(name, **options).modules() if isinstance(m, MixedOperator)]
        assert len(operators) > 3
        for operator in operators:
            assert operator.shift == options['shift']
            assert operator.kernel_groups == 1
    with pytest.raises(ValueError, match=r"shift must be one of .* got 'roll'"):
        build(name, shift='roll')
    with pytest.raises(ValueError, match=r'kernel_groups must be a divisor of .* got 5'):
        build(name, kernel_groups=5)


def write_checkpoint(model: nn.Module, name: str, file: str) -> ConfigDict:
    """A backbone's checkpoint; the ``init_cfg`` that names it."""
    prefix = 'backbone.' if 'Swin' in name else ''  # which mmdet's class expects
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({'state_dict': weights}, file)
    return ConfigDict(type='Pretrained', checkpoint=file)


@pytest.mark.parametrize('name', MIXED)
def test_checkpoints_of_other_kernels_are_refused(name, tmp_path):
    """By init_cfg, and by mmengine's loading, which would leave them out with a warning."""
    file = str(tmp_path / 'checkpoint.pth')
    for ours, theirs in (('fixed', 'learned'), ('random', 'tensor')):
        init_cfg = write_checkpoint(build(name, shift=theirs), name, file)
        model = build(name, shift=ours, init_cfg=init_cfg)
        with pytest.raises(ValueError, match=r'state dict has (learned|constant) kernels, with'):
            model.init_weights()
        model = build(name, shift=ours)
        with pytest.raises(ValueError, match=r'state dict has (learned|constant) kernels, with'):
            load_checkpoint(model, file, revise_keys=[(r'^backbone\.', '')], strict=False)
    init_cfg = write_checkpoint(build(name, shift='tensor'), name, file)
    model = build(name, shift='fixed', init_cfg=init_cfg)
    model.init_weights()
    saved = torch.load(file)['state_dict']
    for key, value in model.state_dict().items():
        torch.testing.assert_close(saved['backbone.' * ('Swin' in name) + key], value)


@pytest.mark.parametrize('name', [n for n in SMALL if n not in ('SAN', 'DWNet')])
def test_checkpoints_of_the_other_form_are_refused(name, tmp_path):
    """By init_cfg, which would load the few names that both forms have."""
    trained = build(name)
    deployed = acmix_mm.deploy(build(name).eval())
    for state, options, message in (
        (trained, {'deploy': True}, r'form for training, .* acmix_mm\.deploy\(model\)'),
        (deployed, {}, 'form for inference, .* deploy=True'),
    ):
        init_cfg = write_checkpoint(state, name, str(tmp_path / 'checkpoint.pth'))
        model = build(name, **options, init_cfg=init_cfg)
        with pytest.raises(ValueError, match=message):
            model.init_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [*SMALL, 'ACmixResNet, tensor shifts', 'ACmixSwinTransformer, one kernel group']
)
def test_inductor_trains(name, monkeypatch):
    """On a channels-last image, with the gradients of the model as it is."""
    monkeypatch.setattr(backbones.SAN, 'arch_settings', {10: (1, 1, 0, 0, 0)})
    model = build(name, **TWO_STAGES.get(name.split(',')[0], {}))
    model.train()
    compiled = copy.deepcopy(model)
    image = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    gradients = []
    for module, forward in ((model, model), (compiled, torch.compile(compiled, dynamic=False))):
        sum(out.square().mean() for out in forward(image)).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters()})
    for parameter, expected in gradients[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradients[1][parameter], expected, rtol=1e-3, atol=1e-3 * scale + 1e-6
        )


@pytest.mark.slow
def test_two_processes_average_to_the_gradients_of_both_halves(tmp_path):
    """In every variant every parameter has a part in the loss, as DistributedDataParallel needs."""
    variants = [(name, {'mix': mix}) for name in MIXED for mix in MIX_MODES]
    variants += [(name, options) for name in MIXED for options in OPTIONS.values()]
    variants += [('SAN', {}), ('ACmixSwinTransformer', {'conv_on_shifted': False})]
    variants += [('XVolutionResNet', {'attention': a}) for a in ATTENTIONS]
    variants += [('DWNet', {'dynamic': d}) for d in (None, 'homogeneous', 'inhomogeneous')]
    halves = torch.randn(4, 3, 64, 64, dtype=torch.float64).chunk(2)
    models = [build(name, **options).double() for name, options in variants]
    tasks = [(model, halves) for model in models]
    for model, results in zip(models, parallel_step(tasks, tmp_path), strict=True):
        expected = mean_gradients(model, halves)
        for result in results:
            torch.testing.assert_close(result['grads'], expected)
