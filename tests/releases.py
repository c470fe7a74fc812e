"""Names of the plain networks' releases, from mmdet's or ours: the inverse of what loading does."""

import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def swin(weights: Weights) -> Weights:
    """Swin's names, and DWNet's, with the classifier's norm and the masks for 224 pixels.

    Detection has a norm for every stage instead. Patch merging concatenates four neighbours, which
    mmdet unfolds.
    """
    state = {}
    for name, value in weights.items():
        if re.match(r'norm\d\.', name):
            continue
        if 'downsample' in name:
            value = value.unflatten(-1, (-1, 2, 2)).permute(*range(value.ndim - 1), -1, -2, -3)
            value = value.flatten(-3)
        if re.search(r'stages\.[012]\.blocks\.\d*[13579]\..*relative_position_index', name):
            block = name.partition('attn')[0].replace('stages', 'layers')
            state[f'{block}attn_mask'] = torch.full((4, 49, 49), -100.0)
        name = name.replace('stages', 'layers').replace('attn.w_msa.', 'attn.')
        name = name.replace('ffn.layers.0.0', 'mlp.fc1').replace('ffn.layers.1', 'mlp.fc2')
        state[name.replace('projection', 'proj')] = value
    channels = 8 * len(weights['patch_embed.projection.weight'])
    return state | classifier(channels, 'head') | {
        f'norm.{kind}': torch.randn(channels) for kind in ('weight', 'bias')
    }  # fmt: skip


def pvt(weights: Weights) -> Weights:
    """PVT's names, for which mmdet joins q with kv and makes linear layers 1x1 convolutions.

    The last stage has a class token, whose position comes before those of the map.
    """
    state = {}
    for name, value in weights.items():
        _, stage, part, *rest = name.split('.')
        number, rest = int(stage) + 1, '.'.join(rest)
        if part == '0':
            state[f'patch_embed{number}.{rest.replace("projection", "proj")}'] = value
        elif rest == '0.pos_embed':
            state[f'pos_embed{number}'] = value
        else:
            index, rest = rest.split('.', 1)
            block = f'block{number}.{int(index) - 1}.'
            kind = rest.rsplit('.', 1)[-1].removeprefix('in_proj_')
            if 'in_proj' in rest:
                state[f'{block}attn.q.{kind}'] = value[: value.shape[0] // 3]
                state[f'{block}attn.kv.{kind}'] = value[value.shape[0] // 3 :]
            elif rest.startswith('ffn'):
                layer = 'fc1' if 'layers.0' in rest else 'fc2'
                state[f'{block}mlp.{layer}.{kind}'] = value.flatten(1) if value.ndim > 1 else value
            else:
                rest = rest.replace('attn.attn.out_proj', 'attn.proj')
                state[f'{block}{rest}'] = value
    if 'pos_embed4' in state and state['pos_embed4'].shape[1] == 49:  # of images of 224 pixels
        token = torch.randn_like(state['pos_embed4'][:, :1])
        state['pos_embed4'] = torch.cat([token, state['pos_embed4']], dim=1)
    channels = state['patch_embed4.proj.weight'].shape[0]
    return state | classifier(channels, 'head') | {
        'cls_token': torch.randn(1, 1, channels),
        'norm.weight': torch.randn(channels),
        'norm.bias': torch.randn(channels),
    }  # fmt: skip


def classifier(channels: int, name: str) -> Weights:
    """Weights of a linear layer for 10 classes."""
    return {f'{name}.weight': torch.randn(10, channels), f'{name}.bias': torch.randn(10)}


def parallel(weights: Weights) -> Weights:
    """As a parallel wrapper names weights."""
    return {f'module.{name}': value for name, value in weights.items()}


def openmmlab(weights: Weights, head: Weights) -> dict:
    """A checkpoint of an image classifier with this backbone."""
    return {'state_dict': {f'backbone.{n}': v for n, v in weights.items()} | head, 'meta': {}}
