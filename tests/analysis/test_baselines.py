"""The formulations that ours are measured against compute the same."""

import pytest
import torch

from acmix_mm.analysis.baselines import FlexAttention, UnfoldACmix, UnfoldPatchACmix
from acmix_mm.layers import ACmix, PatchACmix
from acmix_mm.ops import local_attention

UNFOLDED = {
    'ACmix': (ACmix, UnfoldACmix, (16, 16), {}),
    'ACmix, stride': (ACmix, UnfoldACmix, (16, 16), {'stride': 2}),
    'PatchACmix': (PatchACmix, UnfoldPatchACmix, (64, 16, 4), {}),
}


@pytest.mark.parametrize('name', UNFOLDED)
def test_unfold_formulation_is_the_same_operator(name):
    """The benchmark compares equals: same outputs and gradients from the same weights."""
    *classes, arguments, options = UNFOLDED[name]
    ours, unfolded = (kind(*arguments, **options).double() for kind in classes)
    unfolded.load_state_dict(ours.state_dict())
    x = torch.randn(2, arguments[0], 10, 12, dtype=torch.float64)
    torch.testing.assert_close(unfolded(x), ours(x))
    for module in (ours, unfolded):
        module(x).square().sum().backward()
    for a, b in zip(ours.parameters(), unfolded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('size', [(13, 18), (7, 40)])
def test_flex_attention_has_the_same_neighbourhood_inside(size):
    """Blocks of the mask leave nothing out; without compilation, FlexAttention is plain torch."""
    maps = [torch.randn(1, 2, 8, *size, dtype=torch.float64) for _ in range(3)]
    flex = FlexAttention(size, 'cpu')
    out = torch.empty(1, 2, 8, size[0] * size[1], dtype=torch.float64)
    out[..., flex.order] = flex(*(flex.sequence(m) for m in maps)).transpose(2, 3)
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(out.unflatten(3, size)[inside], local_attention(*maps)[inside])

    index = torch.arange(size[0] * size[1])
    neighbours = flex.mask.mask_mod(0, 0, index[:, None], index)
    assert (neighbours.sum(1) == 49).all()
    blocks = flex.mask.to_dense()[0, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert blocks[: len(index), : len(index)][neighbours].all()
