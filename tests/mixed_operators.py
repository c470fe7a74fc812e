"""A small mixed operator of each family, and both of its paths written out from the formulas.

In float64, with random parameters. Maps are of the first image, channels first, as the operator's
block has them: Swin's are neither padded nor rolled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmdet.models.backbones.pvt import SpatialReductionAttention
from mmdet.models.backbones.swin import ShiftWindowMSA
from torch import Tensor, nn

from acmix_mm.backbones.acmix_swin import ShiftWindowACmix
from acmix_mm.layers import ACmix, MixedOperator, PatchACmix, SpatialReductionACmix
from acmix_mm.ops.reference import mirror


@dataclass
class Case:
    """An operator in a model, and what should come of it.

    Args:
        model (nn.Module): With the operator in it.
        run (Callable[[], Tensor]): Calls the model; the operator's output (C, rows, columns).
        operator (MixedOperator): The operator.
        values (Tensor): What is summed in the attention path, (groups, channels, rows, columns).
        attention (Tensor): The attention path by the formulas, (C, rows, columns).
        convolution (Tensor): The convolution path by the formulas, (C, rows, columns).
        finish (Callable[[Tensor], Tensor]): The attention path from the sums of values (groups,
            channels, rows, columns).
    """

    model: nn.Module
    run: Callable[[], Tensor]
    operator: MixedOperator
    values: Tensor
    attention: Tensor
    convolution: Tensor
    finish: Callable[[Tensor], Tensor]


def randomised(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with parameters and statistics that are not trivial."""
    module.double().eval()
    for name, parameter in module.named_parameters():
        if 'rate' not in name:
            nn.init.normal_(parameter)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
        if isinstance(layer, MixedOperator) and layer.mix == 'learned':
            nn.init.constant_(layer.rate1, 0.7)
            nn.init.constant_(layer.rate2, -0.4)
    return module


def convolution_path(operator: MixedOperator, maps: Tensor, stride: int, dilation: int) -> Tensor:
    """(maps, d, H, W) -> (C, rows, columns): fc for each head position, then the convolution."""
    mixed = torch.einsum('km,mdhw->dkhw', operator.fc['weight'].flatten(1), maps)
    if 'bias' in operator.fc:
        mixed = mixed + operator.fc['bias'].view(-1, 1, 1)
    kernel = operator.dep_conv['weight']
    padding = kernel.size(-1) // 2 * dilation
    groups = maps.size(1)
    return F.conv2d(mixed.flatten(0, 1), kernel, None, stride, padding, dilation, groups)


def acmix(
    size=(7, 5), heads=2, kernel_size=3, stride=1, dilation=1, mix='learned', batch=1
) -> Case:
    operator = ACmix(
        6, 4 * heads, stride=stride, dilation=dilation, bias=True, num_heads=heads,
        attn_kernel_size=kernel_size, mix=mix,
    )  # fmt: skip
    randomised(operator)
    x = torch.randn(batch, 6, *size, dtype=torch.float64)
    query, key, value = (
        F.conv2d(x[0], p['weight'], p['bias']).unflatten(0, (heads, 4))
        for p in (operator.conv1, operator.conv2, operator.conv3)
    )
    x_, y_ = (torch.linspace(-1, 1, n, dtype=x.dtype) for n in reversed(size))
    slopes = operator.conv_p['weight'].flatten(1)
    position = slopes[:, 0, None, None] * x_ + slopes[:, 1, None, None] * y_[:, None]
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    attention = torch.zeros(heads, 4, -(-size[0] // stride), -(-size[1] // stride), dtype=x.dtype)
    for row in range(attention.size(2)):
        for col in range(attention.size(3)):
            i, j = row * stride, col * stride
            taps = [
                (mirror(i + a * dilation, size[0]), mirror(j + b * dilation, size[1]))
                for a in reach
                for b in reach
            ]
            relative = [key[..., r, c] + position[:, i, j] - position[:, r, c] for r, c in taps]
            logits = (query[..., i, j, None] * torch.stack(relative, -1)).sum(1) / 4**0.5
            values = torch.stack([value[..., r, c] for r, c in taps], -1)
            attention[..., row, col] = (logits.softmax(-1)[:, None] * values).sum(-1)
    maps = torch.cat([query, key, value])
    return Case(
        nn.Sequential(operator),
        lambda: operator(x)[0],
        operator,
        value,
        attention.flatten(0, 1),
        convolution_path(operator, maps, stride, dilation),
        lambda sums: sums.flatten(0, 1),
    )


def patch(size=(6, 5), kernel_size=3, batch=1) -> Case:
    operator = randomised(PatchACmix(8, 16, 4, kernel_size))
    norm = randomised(nn.BatchNorm2d(8))
    x = torch.randn(batch, 8, *size, dtype=torch.float64)
    features = F.relu(norm(x))[:1]
    query, key, value = (c(features) for c in (operator.conv1, operator.conv2, operator.conv3))
    radius = kernel_size // 2
    keys, values = (
        F.unfold(F.pad(m, (radius,) * 4, mode='reflect'), kernel_size) for m in (key, value)
    )
    weights = operator.conv_w(torch.cat([query, keys.unflatten(-1, size)], 1))
    weights = weights[0].unflatten(0, (2, 1, kernel_size**2))  # two groups of channels
    values = values[0].unflatten(0, (8, 2, kernel_size**2)).unflatten(-1, size)  # c mod 2
    attention = (weights.transpose(0, 1) * values).sum(2).flatten(0, 1)
    maps = torch.cat([query, key, value], 1)[0].unflatten(0, (6, 4))
    model = nn.ModuleDict({'sam': operator, 'norm': norm})
    return Case(
        model,
        lambda: operator(x, norm)[0],
        operator,
        value[0].unflatten(0, (8, 2)).transpose(0, 1),
        attention,
        convolution_path(operator, maps, 1, 1),
        lambda sums: sums.transpose(0, 1).flatten(0, 1),
    )


def reduced(size=(5, 7), ratio=2, heads=2, batch=1) -> Case:
    attention = SpatialReductionAttention(8, heads, sr_ratio=ratio)
    operator = randomised(SpatialReductionACmix(attention))
    x = torch.randn(batch, size[0] * size[1], 8, dtype=torch.float64)
    image = x[0].T.unflatten(1, size)
    weight, bias = operator.attn.in_proj_weight, operator.attn.in_proj_bias
    maps = torch.einsum('oc,chw->ohw', weight, image) + bias[:, None, None]
    maps = maps.unflatten(0, (3 * heads, -1))
    query, key, value = maps.split(heads)
    if ratio > 1:
        tokens = operator.norm(operator.sr(image[None])[0].flatten(1).T)
        grid = (size[0] // ratio, size[1] // ratio)
        both = (tokens @ weight[8:].T + bias[8:]).T.unflatten(0, (2, heads, -1)).unflatten(-1, grid)
        key, value = both
    logits = torch.einsum('ndp,ndk->npk', query.flatten(2), key.flatten(2)) / (8 / heads) ** 0.5
    sums = torch.einsum('npk,ndk->ndp', logits.softmax(-1), value.flatten(2)).unflatten(-1, size)

    def finish(sums: Tensor) -> Tensor:
        out = operator.attn.out_proj(sums.flatten(0, 1).flatten(1).T)
        return out.T.unflatten(1, size)

    return Case(
        nn.ModuleDict({'attn': operator}),
        lambda: (operator(x, size, x) - x)[0].T.unflatten(1, size),
        operator,
        value,
        finish(sums),
        convolution_path(operator, maps, 1, 1),
        finish,
    )


def window(size=(7, 8), shift=1, heads=2, unshifted=False, batch=1) -> Case:
    block = ShiftWindowMSA(8, heads, window_size=3, shift_size=shift)
    block = randomised(ShiftWindowACmix(block, {}, conv_on_shifted=not unshifted))
    operator = block.w_msa
    x = torch.randn(batch, size[0] * size[1], 8, dtype=torch.float64)
    padded = [-(-side // 3) * 3 for side in size]
    image = F.pad(x[0].T.unflatten(1, size), (0, padded[1] - size[1], 0, padded[0] - size[0]))
    maps = torch.einsum('oc,chw->ohw', operator.qkv.weight, image)
    maps = (maps + operator.qkv.bias[:, None, None]).unflatten(0, (3 * heads, -1))
    query, key, value = maps.split(heads)

    def rolled(position: int, side: int) -> int:
        return (position - shift) % side

    def region(position: int, side: int) -> int:
        """On which side of the border of a window a rolled position has been before."""
        return int(shift > 0 and position >= side - shift)

    table = operator.relative_position_bias_table
    sums = torch.zeros_like(value)
    for row in range(padded[0]):
        for col in range(padded[1]):
            i, j = rolled(row, padded[0]), rolled(col, padded[1])
            logits, values = [], []
            for r in range(padded[0]):
                for c in range(padded[1]):
                    k, m = rolled(r, padded[0]), rolled(c, padded[1])
                    if (k // 3, m // 3) != (i // 3, j // 3):
                        continue
                    logit = (query[..., row, col] * key[..., r, c]).sum(1) / (8 / heads) ** 0.5
                    logit = logit + table[(i % 3 - k % 3 + 2) * 5 + j % 3 - m % 3 + 2]
                    same = (region(i, padded[0]), region(j, padded[1])) == (
                        region(k, padded[0]), region(m, padded[1]),
                    )  # fmt: skip
                    logits.append(logit - (0 if same else 100))
                    values.append(value[..., r, c])
            weights = torch.stack(logits, -1).softmax(-1)
            sums[..., row, col] = (weights[:, None] * torch.stack(values, -1)).sum(-1)

    def finish(sums: Tensor) -> Tensor:
        return operator.proj(sums.flatten(0, 1).permute(1, 2, 0)).permute(2, 0, 1)

    seen = maps if unshifted else maps.roll((-shift, -shift), (2, 3))
    convolution = convolution_path(operator, seen, 1, 1)
    convolution = convolution if unshifted else convolution.roll((shift, shift), (1, 2))
    crop = (..., slice(size[0]), slice(size[1]))
    return Case(
        block,
        lambda: block(x, size)[0].T.unflatten(1, size),
        operator,
        value,
        finish(sums)[crop],
        convolution[crop],
        finish,
    )


CASES = {
    'ACmix': acmix,
    'ACmix, 7x7 on a map smaller than it': lambda: acmix((3, 2), 2, 7),
    'ACmix, odd map, stride 2': lambda: acmix((7, 5), 3, 5, stride=2),
    'ACmix, stride 2, dilation 2': lambda: acmix((6, 9), 2, 3, 2, 2),
    'ACmix of one pixel': lambda: acmix((1, 1)),
    'PatchACmix': patch,
    'PatchACmix, 5x5': lambda: patch((4, 7), 5),
    'SpatialReductionACmix': reduced,
    'SpatialReductionACmix, nothing reduced': lambda: reduced((4, 3), 1, 4),
    'WindowACmix': lambda: window((6, 9), 0),
    'WindowACmix, padded and shifted': window,
    'WindowACmix, convolution unshifted': lambda: window((8, 7), 1, 4, unshifted=True),
}
