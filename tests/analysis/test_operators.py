import pytest
import torch

from acmix_mm.analysis.operators import (
    SHIFT_FORMS,
    build_attention,
    build_convolution_path,
    build_part,
    build_shift_layer,
)
from acmix_mm.analysis.steps import Case


def test_attention_candidates_are_the_same_attention():
    """By the gradients of query, key and value, which the steps leave behind."""
    case = Case((1, 2, 8, 9, 12), train=True)
    steps = [build_attention(name, None, case) for name in ('local_attention', 'unfold')]
    for step in steps:
        step()
    for a, b in zip(*(step.leaves for step in steps), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('name', ['group_conv', 'local_aggregation', 'patch_weights'])
def test_backends_of_a_part_are_the_same_operator(name):
    case = Case((2, 16, 9, 12), train=True)
    steps = [build_part(name, backend, case) for backend in (None, 'torch')]
    for step in steps:
        step()
    for a, b in zip(*(step.leaves for step in steps), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('heads', [2, 8])
def test_forms_of_the_shift_are_the_same_operator(heads):
    """All start with shift kernels: the same gradients of the input, in either form of fc."""
    shape = (1, heads, 4, 9, 12)
    builds = {
        'path': lambda form: build_convolution_path(form, None, Case(shape, train=True)),
        'layer': lambda form: build_shift_layer(
            form, heads, None, Case((1, 4 * heads, 9, 12), train=True)
        ),
    }
    for build in builds.values():
        gradients = []
        for form in SHIFT_FORMS:
            step = build(form)
            step()
            gradients.append(step.leaves[-1].grad)
        assert gradients[0].abs().max() > 0.1
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-5)
