"""Training through torch.compile with its default backend, Inductor, on a channels-last map."""

import copy

import pytest
import torch
from torch import nn

from acmix_mm.layers import ACmix, PatchACmix

LAYERS = {
    'ACmix': lambda: ACmix(8, 8, backend='native'),
    'PatchACmix': lambda: PatchACmix(16, 16, 4, 3),
}


@pytest.mark.parametrize('name', ['ACmix', pytest.param('PatchACmix', marks=pytest.mark.slow)])
def test_trains_as_uncompiled(name):
    """Gradients, whose strides a fake kernel must have foretold."""
    layer = LAYERS[name]()
    channels = 8 if name == 'ACmix' else 16
    model = nn.Sequential(nn.Conv2d(3, channels, 1), layer, nn.Conv2d(channels, 4, 3))
    compiled = copy.deepcopy(model)
    image = torch.randn(2, 3, 9, 12).contiguous(memory_format=torch.channels_last)
    for forward in (model, torch.compile(compiled, dynamic=False)):
        forward(image).square().mean().backward()
    for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        scale = ours.grad.abs().max().item()
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-4 * scale + 1e-7)
