"""What holds for every backbone: meta tensors, train and eval, Inductor, the registry."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from parallel_step import mean_gradients
from processes import parallel_step
from torch import nn

import acmix_mm
from acmix_mm import backbones
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
every_backbone = pytest.mark.parametrize('name', SMALL)


def build(name: str, **more) -> nn.Module:
    return getattr(backbones, name)(**{**SMALL[name], **more})


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


@every_backbone
def test_meta_tensors(name):
    model = build(name)
    image = torch.randn(2, 3, 64, 64)
    shapes = [out.shape for out in model(image)]
    outputs = model.to('meta')(image.to('meta'))
    assert [out.shape for out in outputs] == shapes
    sum(out.sum() for out in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', [n for n in SMALL if n not in ('SAN', 'DWNet')])
def test_checkpoints_of_the_other_form_are_refused(name, tmp_path):
    """By init_cfg, which would load the few names that both forms have."""
    trained = build(name)
    deployed = acmix_mm.deploy(build(name).eval())
    for state, options, message in (
        (trained, {'deploy': True}, r'form for training, .* acmix_mm\.deploy\(model\)'),
        (deployed, {}, 'form for inference, .* deploy=True'),
    ):
        file = str(tmp_path / 'checkpoint.pth')
        prefix = 'backbone.' if 'Swin' in name else ''  # which mmdet's class expects
        weights = {prefix + key: value for key, value in state.state_dict().items()}
        torch.save({'state_dict': weights}, file)
        init_cfg = ConfigDict(type='Pretrained', checkpoint=file)
        model = build(name, **options, init_cfg=init_cfg)
        with pytest.raises(ValueError, match=message):
            model.init_weights()


@pytest.mark.slow
@every_backbone
def test_inductor_trains(name, monkeypatch):
    """On a channels-last image, with the gradients of the model as it is."""
    monkeypatch.setattr(backbones.SAN, 'arch_settings', {10: (1, 1, 0, 0, 0)})
    model = build(name, **TWO_STAGES.get(name, {}))
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
    mixed = ('ACmixResNet', 'ACmixSAN', 'ACmixPyramidVisionTransformer', 'ACmixSwinTransformer')
    variants = [(name, {'mix': mix}) for name in mixed for mix in MIX_MODES]
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
