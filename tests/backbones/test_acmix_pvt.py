import pytest
import torch
from mmdet.models.backbones import PyramidVisionTransformer
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.backbones import ACmixPyramidVisionTransformer
from acmix_mm.layers import SpatialReductionACmix
from acmix_mm.layers.mixed_operator import MIX_MODES
from acmix_mm.layers.mixing_weights import shift_kernel

SMALL = {'embed_dims': 8, 'num_layers': [1, 2, 1, 1], 'mlp_ratios': [2, 2, 2, 2]}
LAYERS = {'t': [2, 2, 2, 2], 's': [3, 4, 6, 3]}


def small(**arguments) -> ACmixPyramidVisionTransformer:
    return ACmixPyramidVisionTransformer(**{**SMALL, **arguments})


# The paper prints 13 and 25 M; 13.40 and 24.83 M are those of PVT with the operators' parameters.
@pytest.mark.parametrize(('size', 'millions'), [('t', 13.40), ('s', 24.83)])
def test_parameter_count(size, millions):
    model = ACmixPyramidVisionTransformer(num_layers=LAYERS[size])
    head, norm = nn.Linear(512, 1000), nn.LayerNorm(512)
    count = sum(p.numel() for m in (model, head, norm) for p in m.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(('size', 'billions'), [('t', 2.0), ('s', 3.9)])
def test_flops(size, billions):
    """Multiplications of products and convolutions at 224, as the paper counts FLOPs."""
    # On this device all operators are PyTorch's own, which the counter knows.
    model = ACmixPyramidVisionTransformer(num_layers=LAYERS[size]).to('meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    # Within a tenth of what the paper may have rounded to one decimal.
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, abs=0.1 * billions + 0.05)


@pytest.mark.parametrize('size', [(64, 96), (75, 50)])
def test_equals_plain_pvt(size):
    """mmdet's network, from its state dict, at rate1 = 1 and rate2 = 0."""
    plain = PyramidVisionTransformer(**SMALL).double()
    plain.init_weights()
    plain.eval()
    model = small().double()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all('.fc.' in n or '.dep_conv.' in n or '.rate' in n for n in missing)
    for name, parameter in model.named_parameters():
        if name.endswith(('rate1', 'rate2')):
            nn.init.constant_(parameter, name.endswith('rate1'))
    model.eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize('mix', MIX_MODES)
def test_sizes_and_mix_modes(mix):
    model = MODELS.build({'type': 'ACmixPyramidVisionTransformer', **SMALL, 'mix': mix})
    model.init_weights()
    outs = model(torch.randn(2, 3, 75, 49))
    sizes = [(18, 12), (9, 6), (4, 3), (2, 1)]
    assert [tuple(o.shape) for o in outs] == [
        (2, c, *s) for c, s in zip((8, 16, 40, 64), sizes, strict=True)
    ]
    sum(o.square().mean() for o in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_small_images():
    model = small().eval()
    x = torch.randn(1, 3, 17, 33)
    padded = torch.zeros(1, 3, 32, 33)
    padded[:, :, :17] = x
    torch.testing.assert_close(model(x), model(padded), rtol=0, atol=0)
    assert [o.shape[-2:] for o in model(x)] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert all(torch.isfinite(o).all() for o in model(torch.randn(1, 3, 1, 1)))


def test_arguments_reach_the_operator():
    model = small(conv_kernel_size=5, mix='sum', backend='torch', out_indices=(1, 3))
    layers = [m for m in model.modules() if isinstance(m, SpatialReductionACmix)]
    assert [m.sr_ratio for m in layers] == [8, 4, 4, 2, 1]
    for layer in layers:
        assert layer.dep_conv['weight'].shape[1:] == (25, 5, 5)
        assert (layer.mix, layer.backend) == ('sum', 'torch')
    assert len(model(torch.randn(1, 3, 32, 32))) == 2


def test_convolutional_ffn_and_norms():
    """The arguments with which mmdet makes PVTv2 of its class."""
    model = small(
        patch_sizes=[7, 3, 3, 3],
        paddings=[3, 1, 1, 1],
        use_abs_pos_embed=False,
        norm_after_stage=True,
        use_conv_ffn=True,
    )
    assert [o.shape[-1] for o in model(torch.randn(1, 3, 33, 33))] == [9, 5, 3, 2]


def test_init_weights_keeps_shift_initialisation():
    model = small()
    model.init_weights()
    for layer in model.modules():
        if isinstance(layer, SpatialReductionACmix):
            kernel = shift_kernel(layer.embed_dims, layer.head_dim, 3)
            assert torch.equal(layer.dep_conv['weight'], kernel)
            assert layer.rate1.item() == layer.rate2.item() == 0.5


def published_pvt_names(state: dict) -> dict:
    """Names of PVT's own code for one block of stage 2, with separate q and kv, and the head."""
    dims = 16
    weight, bias = torch.randn(3 * dims, dims), torch.randn(3 * dims)
    return {
        'pos_embed2': torch.randn_like(state['layers.1.1.0.pos_embed']),
        'block2.0.attn.q.weight': weight[:dims],
        'block2.0.attn.kv.weight': weight[dims:],
        'block2.0.attn.q.bias': bias[:dims],
        'block2.0.attn.kv.bias': bias[dims:],
        'block2.0.mlp.fc1.weight': torch.randn(32, dims),
        'head.weight': torch.ones(5, 64),
    }


def test_warm_start(tmp_path):
    """From PVT's own names, which are converted."""
    published = published_pvt_names(small().state_dict())
    file = tmp_path / 'pvt.pth'
    torch.save(published, file)
    init_cfg = ConfigDict(type='Pretrained', checkpoint=str(file))
    model = small(warm_start=True, init_cfg=init_cfg, drop_path_rate=0.0)
    model.init_weights()
    block = model.layers[1][1][1]
    torch.testing.assert_close(
        block.attn.attn.in_proj_weight.detach(),
        torch.cat([published[f'block2.0.attn.{n}.weight'] for n in ('q', 'kv')]),
    )
    assert torch.equal(model.layers[1][1][0].pos_embed, published['pos_embed2'])
    for layer in model.modules():
        if isinstance(layer, SpatialReductionACmix):
            assert (layer.rate1.item(), layer.rate2.item()) == (1, 0)
    model(torch.randn(1, 3, 32, 32))[-1].mean().backward()
    assert block.attn.rate2.grad.abs() > 0


def test_deploy_form():
    model = small().double().eval()
    model.eval()
    x = torch.randn(2, 3, 75, 50, dtype=torch.float64)
    expected = model(x)
    model.switch_to_deploy()
    torch.testing.assert_close(model(x), expected)
    built = small(deploy=True).double()
    built.load_state_dict(model.state_dict())
    built.eval()
    torch.testing.assert_close(built(x), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_trains(dtype):
    model, x = small(), torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', dtype=dtype):
        outs = model(x)
    sum(o.float().mean() for o in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'mix': 'both'}, "mix must be one of .* got 'both'"),
        ({'conv_kernel_size': 4}, 'kernel_size must be a positive odd integer, got 4'),
        ({'warm_start': True, 'mix': 'sum'}, "warm_start must be False .* mix='sum'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
