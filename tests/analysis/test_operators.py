import torch

from acmix_mm.analysis.operators import build_attention
from acmix_mm.analysis.steps import Case


def test_attention_candidates_are_the_same_attention():
    """By the gradients of query, key and value, which the steps leave behind."""
    case = Case((1, 2, 8, 9, 12), train=True)
    steps = [build_attention(name, None, case) for name in ('local_attention', 'unfold')]
    for step in steps:
        step()
    for a, b in zip(*(step.leaves for step in steps), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
