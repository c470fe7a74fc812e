import copy
import math

import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.backbones import ACmixSwinTransformer
from acmix_mm.backbones.acmix_swin import ShiftWindowACmix, shift_mask
from acmix_mm.layers import WindowACmix
from acmix_mm.layers.mixed_operator import MIX_MODES
from acmix_mm.layers.mixing_weights import shift_kernel

SMALL = {'embed_dims': 12, 'depths': (2, 1, 2, 1), 'num_heads': (3, 3, 6, 12), 'mlp_ratio': 2}
DEPTHS = {'t': (2, 2, 6, 2), 's': (2, 2, 18, 2)}


def small(**arguments) -> ACmixSwinTransformer:
    return ACmixSwinTransformer(**{**SMALL, **arguments})


def set_rates(model: nn.Module, rate1: float, rate2: float) -> None:
    for module in model.modules():
        if isinstance(module, WindowACmix):
            nn.init.constant_(module.rate1, rate1)
            nn.init.constant_(module.rate2, rate2)


# The authors' release with its final norm and 1000-way classifier.
@pytest.mark.parametrize(('size', 'count'), [('t', 28649908), ('s', 50345080)])
def test_parameter_count(size, count):
    model, head = ACmixSwinTransformer(depths=DEPTHS[size], out_indices=(3,)), nn.Linear(768, 1000)
    assert sum(p.numel() for m in (model, head) for p in m.parameters()) == count


@pytest.mark.parametrize(('size', 'billions'), [('t', 4.6), ('s', 9.0)])
def test_flops(size, billions):
    """Multiplications of products and convolutions at 224, as the paper counts FLOPs."""
    # On this device all operators are PyTorch's own, which the counter knows.
    model = ACmixSwinTransformer(depths=DEPTHS[size]).to('meta')
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.1)


def test_golden(golden, tmp_path):
    """The authors' network, through the conversion of its names, at its input size."""
    tensors = golden('acmix_swin_embed24')
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    torch.save({'model': state}, tmp_path / 'published.pth')
    model = ACmixSwinTransformer(
        embed_dims=24,
        depths=(2, 2, 2, 2),
        num_heads=(3, 3, 6, 12),
        convert_weights=True,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth')),
    ).double()
    model.init_weights()
    # Published outputs have no norm but the last, whose name is not that of a stage.
    model.norm0 = model.norm1 = model.norm2 = nn.Identity()
    model.norm3.load_state_dict({k: state[f'norm.{k}'] for k in ('weight', 'bias')})
    model.eval()
    with torch.no_grad():
        outs = model(tensors['input'])
    outs[0], outs[1] = (out[:, :, ::4, ::4] for out in outs[:2])
    for out, name in zip(outs, ('0', '1', '2', '4'), strict=True):
        torch.testing.assert_close(out, tensors[f'output/{name}'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('conv_on_shifted', [True, False])
def test_equals_plain_swin(conv_on_shifted):
    """mmdet's network, from its state dict, at rate1 = 1 and rate2 = 0; all maps shift."""
    plain = SwinTransformer(**SMALL, window_size=4).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain.eval()
    model = small(window_size=4, conv_on_shifted=conv_on_shifted).double()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all('.fc.' in n or '.dep_conv.' in n or '.rate' in n for n in missing)
    set_rates(model, 1, 0)
    model.eval()
    x = torch.randn(2, 3, 145, 170, dtype=torch.float64)  # 5x6 in the last stage
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize('size', [(14, 21), (9, 16), (8, 8)])
@pytest.mark.parametrize('shift', [0, 3])
def test_windows_shift_like_mmdet(size, shift):
    attention = ShiftWindowMSA(12, 3, 7, shift).double()
    nn.init.normal_(attention.w_msa.relative_position_bias_table)
    module = ShiftWindowACmix(copy.deepcopy(attention), {}, True).double()
    set_rates(module, 1, 0)
    x = torch.randn(2, size[0] * size[1], 12, dtype=torch.float64)
    torch.testing.assert_close(module(x, size), attention(x, size))


@pytest.mark.parametrize('size', [(5, 9), (7, 7), (20, 7)])
def test_small_maps_do_not_shift(size):
    """Nor have they a mask: as without shift."""
    attention = ShiftWindowMSA(12, 3, 7, 3)
    module = ShiftWindowACmix(attention, {}, True)
    x = torch.randn(2, size[0] * size[1], 12)
    out = module(x, size)
    module.shift_size = 0
    assert torch.equal(out, module(x, size))


def test_shift_mask():
    """By which pixels of a shifted map were neighbours: those with all wrapped or none."""
    height, width, window, shift = 6, 9, 3, 1
    mask = shift_mask(height, width, window, shift, torch.empty(0))
    for index, row in enumerate(mask):
        top, left = index // 3 * window, index % 3 * window
        for i in range(9):
            for j in range(9):
                wrapped = [
                    (top + p // window + shift >= height, left + p % window + shift >= width)
                    for p in (i, j)
                ]
                assert row[i, j] == (0 if wrapped[0] == wrapped[1] else -math.inf)


def test_mask_leaves_no_subnormal_weights():
    """With -100, as in Swin, they are there, and a processor computes slowly with them."""
    module, tiny = ShiftWindowACmix(ShiftWindowMSA(12, 3, 7, 3), {}, True), 2.0**-126
    x, subnormal = torch.randn(1, 196, 12), []

    def pack(tensor):
        subnormal.append(((tensor != 0) & (tensor.abs() < tiny)).any().item())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, (14, 14))
    assert not any(subnormal)


def test_conv_on_shifted():
    """The convolution path alone sees the map as it was, or over the seam of the shift."""
    arguments = {'attention': ShiftWindowMSA(12, 3, 7, 3), 'acmix': {'mix': 'conv'}}
    seam, plain = (ShiftWindowACmix(conv_on_shifted=c, **arguments).double() for c in (True, False))
    plain.load_state_dict(seam.state_dict())
    unshifted = copy.deepcopy(plain)
    unshifted.shift_size = 0
    size = (14, 14)
    x = torch.randn(1, 196, 12, dtype=torch.float64)
    torch.testing.assert_close(plain(x, size), unshifted(x, size))
    different = (seam(x, size) - plain(x, size)).abs().sum(2).view(size) > 1e-9
    inside = torch.ones(size, dtype=torch.bool)
    inside[[0, 2, 3, 13]] = inside[:, [0, 2, 3, 13]] = False
    assert different.any()
    assert not different[inside].any()


@pytest.mark.parametrize('size', [(14, 14), (10, 13)])
def test_conv_swin_is_a_plain_convolution(size):
    """The convolution path alone: one 3x3 convolution, whose kernel its impulse responses tell."""
    module = ShiftWindowACmix(ShiftWindowMSA(12, 3, 7, 3), {'mix': 'conv'}, False).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    offset = module(torch.zeros(1, size[0] * size[1], 12, dtype=torch.float64), size)

    def linear_part(maps):
        out = module(maps.flatten(2).transpose(1, 2), size) - offset
        return out.transpose(1, 2).unflatten(2, size)

    impulses = torch.zeros(12, 12, *size, dtype=torch.float64)
    impulses[:, :, 5, 6] = torch.eye(12)
    kernel = linear_part(impulses)[:, :, 4:7, 5:8].transpose(0, 1).flip(2, 3)
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    torch.testing.assert_close(linear_part(x), nn.functional.conv2d(x, kernel, padding=1))


@pytest.mark.parametrize('size', [(17, 33), (1, 1), (64, 47)])
def test_any_size(size):
    model = MODELS.build({'type': 'ACmixSwinTransformer', **SMALL})
    model.init_weights()
    outs = model(torch.randn(2, 3, *size))
    stem = [-(-s // 4) for s in size]
    for level, out in enumerate(outs):
        assert out.shape == (2, 12 * 2**level, *(-(-s // 2**level) for s in stem))
        assert torch.isfinite(out).all()


@pytest.mark.parametrize('mix', MIX_MODES)
def test_mix_modes(mix):
    model = small(mix=mix, drop_path_rate=0.0)
    model.train()
    sum(o.square().mean() for o in model(torch.randn(1, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        # Nothing but norms reads the outputs, and a norm takes the sums of squares as they are.
        assert parameter.grad is not None, name


def test_init_weights_keeps_shift_initialisation():
    model = small()
    model.init_weights()
    for layer in model.modules():
        if isinstance(layer, WindowACmix):
            kernel = shift_kernel(layer.embed_dims, layer.head_dim, 3)
            assert torch.equal(layer.dep_conv['weight'], kernel)
            assert layer.rate1.item() == layer.rate2.item() == 0.5
            assert not layer.qkv.bias.any()


def test_arguments_reach_the_operator():
    model = small(
        conv_kernel_size=5, mix='sum', backend='torch', window_size=5, qkv_bias=False,
        qk_scale=0.5, attn_drop_rate=0.1, drop_rate=0.2, drop_path_rate=0.3, out_indices=(1, 3),
    )  # fmt: skip
    layers = [m for m in model.modules() if isinstance(m, WindowACmix)]
    assert len(layers) == sum(SMALL['depths'])
    for layer in layers:
        assert layer.dep_conv['weight'].shape[1:] == (25, 5, 5)
        assert (layer.mix, layer.backend, layer.window_size) == ('sum', 'torch', (5, 5))
        assert layer.qkv.bias is None
        assert (layer.scale_factor, layer.attn_drop_rate, layer.proj_drop.p) == (0.5, 0.1, 0.2)
    assert model.stages[3].blocks[0].attn.drop.drop_prob == pytest.approx(0.3)
    assert [m.shift_size for m in model.modules() if isinstance(m, ShiftWindowACmix)] == [
        0, 2, 0, 0, 2, 0,
    ]  # fmt: skip
    assert len(model(torch.randn(1, 3, 32, 32))) == 2


def test_frozen_stages():
    model = small(frozen_stages=2)
    model.train()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(('patch_embed', 'stages.0', 'stages.1', 'norm0', 'norm1'))
        assert parameter.requires_grad is not frozen, name
    assert not model.stages[1].training
    assert model.stages[2].training


def test_with_cp_gives_the_same_gradients():
    x = torch.randn(1, 3, 40, 40)
    plain, checkpointed = (small(drop_path_rate=0.0, with_cp=c) for c in (False, True))
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        model.train()
        sum(o.square().mean() for o in model(x)).backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_absolute_position_embedding():
    model = small(use_abs_pos_embed=True, pretrain_img_size=(32, 48))
    assert model.absolute_pos_embed.shape == (1, 8 * 12, 12)
    assert len(model(torch.randn(1, 3, 32, 48))) == 4


def official_names(state: dict) -> dict:
    """From mmdet's names to those of Swin's own code and the release; downsampling as it is."""
    renamed = {}
    for name, value in state.items():
        name = name.replace('stages', 'layers').replace('attn.w_msa.', 'attn.')
        name = name.replace('ffn.layers.0.0', 'mlp.fc1').replace('ffn.layers.1', 'mlp.fc2')
        renamed[name.replace('projection', 'proj')] = value
    return renamed


def pretrained(tmp_path, state: dict, **arguments) -> ACmixSwinTransformer:
    file = tmp_path / 'checkpoint.pth'
    torch.save({'model': state}, file)
    return small(init_cfg=ConfigDict(type='Pretrained', checkpoint=str(file)), **arguments)


@pytest.mark.parametrize('official', [False, True])
def test_warm_start(tmp_path, monkeypatch, official):
    """From Swin's checkpoint: the same outputs, and a log of what it does not have."""
    plain = SwinTransformer(**SMALL)
    plain.init_weights()
    plain.eval()
    state = plain.state_dict()
    if official:
        state = official_names({k: v for k, v in state.items() if 'downsample' not in k})
    else:
        state = {f'backbone.{k}': v for k, v in state.items()}
    logged = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', logged.append)
    model = pretrained(tmp_path, state, warm_start=True, convert_weights=official)
    model.init_weights()
    if official:  # conversion orders these otherwise, see test_golden
        model.load_state_dict(
            {k: v for k, v in plain.state_dict().items() if 'downsample' in k}, strict=False
        )
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    expected = plain(x)[0]
    torch.testing.assert_close(model(x)[0], expected)
    (message,) = (m for m in logged if 'keep their initial values' in m)
    new = message.split(': ')[-1].split(', ')
    ours = {n for n in model.state_dict() if '.fc.' in n or '.dep_conv.' in n or '.rate' in n}
    assert set(new) == ours | {n for n in model.state_dict() if official and 'downsample' in n}
    model(x)[-1].square().mean().backward()
    for layer in model.modules():
        if isinstance(layer, WindowACmix):
            assert (layer.rate1.item(), layer.rate2.item()) == (1, 0)
            assert layer.rate2.grad is not None


def test_warm_start_refuses(tmp_path):
    state = {f'backbone.{k}': v for k, v in small().state_dict().items()}
    with pytest.raises(ValueError, match=r'warm_start must be False for .* mixed .*\.rate1'):
        pretrained(tmp_path, state, warm_start=True).init_weights()
    with pytest.raises(ValueError, match='has none of the weights of ACmixSwin'):
        pretrained(tmp_path, {'backbone.a': torch.ones(1)}, warm_start=True).init_weights()
    with pytest.raises(ValueError, match='warm_start must be False without init_cfg'):
        small(warm_start=True).init_weights()


def test_deploy_form():
    model = small().double()
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
    sum(o.float().square().mean() for o in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiles():
    model = small(depths=(2,), num_heads=(3,), strides=(4,), out_indices=(0,))
    model.eval()
    x = torch.randn(1, 3, 40, 36)
    compiled = torch.compile(model, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_heads': (3, 5, 6, 12)}, r'embed_dims must be divisible by num_heads \(5\), got 24'),
        ({'mix': 'both'}, "mix must be one of .* got 'both'"),
        ({'conv_kernel_size': 4}, 'kernel_size must be a positive odd integer, got 4'),
        ({'backend': 'fast'}, "backend must be None or one of .* got 'fast'"),
        ({'warm_start': True, 'mix': 'sum'}, "warm_start must be False .* mix='sum'"),
        ({'warm_start': True, 'deploy': True}, 'warm_start must be False .* deploy=True'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
