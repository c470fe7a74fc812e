"""Products of matrices by either library: layouts, gradients, and where oneDNN has to keep out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from devices import needs_native, needs_onednn
from torch._subclasses import FakeTensorMode

from acmix_mm.ops import _products as products

CPU_INFO = Path('/proc/cpuinfo')

either = pytest.mark.parametrize(
    'onednn', [False, pytest.param(True, marks=needs_onednn)], indirect=True
)


@pytest.fixture
def onednn(request, monkeypatch) -> bool:
    """Whether oneDNN multiplies, whatever the processor."""
    monkeypatch.setattr(torch.ops.acmix_mm, 'native_onednn_products_pay', lambda: request.param)
    return request.param


@needs_native
@pytest.mark.skipif(not CPU_INFO.is_file(), reason='compares with what Linux says of the processor')
def test_onednn_products_by_processor():
    """Not on Intel's, nor without AVX-512, nor where oneDNN is switched off."""
    pay = torch.ops.acmix_mm.native_onednn_products_pay
    wide = torch.backends.cpu.get_cpu_capability() == 'AVX512'
    mkl = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    other = 'GenuineIntel' not in CPU_INFO.read_text()
    assert pay() == (wide and mkl and other and torch.backends.mkldnn.enabled)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        assert not pay()


@needs_native
@either
@pytest.mark.parametrize('out_dtype', [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('sizes', [(24, 8, 30), (3, 1, 1), (1, 40, 5)])
def test_product_of_any_layout(onednn, out_dtype, sizes):
    """Matrices of rows, of columns, with gaps between rows; results to rows with gaps."""
    rows, inner, columns = sizes
    layouts = (
        lambda t: t,
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t], 1)[:, : t.size(1)],
        lambda t: torch.cat([t, t])[: len(t)].T.contiguous().T,
    )
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    expected = left.double() @ right.double()
    for a in layouts:
        for b in layouts:
            out = None
            if out_dtype is not None:
                out = torch.full((rows, columns + 3), torch.nan, dtype=out_dtype)[:, :columns]
            result = products.product(a(left), b(right), out)
            assert out is None or result is out
            tolerance = 1e-2 if out_dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


# Ours, PyTorch's, and shapes of the arguments.
FORMS = {
    'mm': (products.mm, torch.mm, [(5, 7), (7, 3)]),
    'addmm_': (
        lambda out, a, b: products.addmm_(out.clone(), a, b), torch.addmm, [(5, 3), (5, 7), (7, 3)],
    ),
    'bmm': (products.bmm, torch.bmm, [(2, 5, 7), (2, 7, 3)]),
    'bmm, added': (
        lambda added, a, b: products.bmm(a, b, added), torch.baddbmm, [(5, 1), (2, 5, 7), (2, 7, 3)]
    ),
    'linear': (products.linear, F.linear, [(2, 4, 5, 7), (3, 7), (3,)]),
    'linear without bias': (products.linear, F.linear, [(5, 7), (3, 7)]),
}  # fmt: skip


@pytest.fixture
def called(monkeypatch) -> list:
    """What oneDNN multiplies."""
    calls, multiply = [], products._by_onednn

    def by_onednn(*tensors):
        calls.append(tensors)
        return multiply(*tensors)

    monkeypatch.setattr(products, '_by_onednn', by_onednn)
    return calls


@needs_native
@either
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('layout', ['contiguous', 'columns first', 'gaps'])
def test_equals_pytorchs(onednn, called, form, layout):
    function, other, shapes = FORMS[form]
    change = {
        'contiguous': lambda t: t,
        'columns first': lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        'gaps': lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],
    }[layout]
    tensors = [change(torch.randn(shape)) for shape in shapes]
    with torch.no_grad():
        result = function(*tensors)
    assert bool(called) == onednn
    expected = other(*(t.double() for t in tensors))
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize('onednn', [True], indirect=True)
@pytest.mark.parametrize('form', FORMS)
def test_gradients_are_pytorchs(onednn, called, form):
    function, other, shapes = FORMS[form]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    ours = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    theirs = torch.autograd.grad(other(*tensors).square().sum(), tensors)
    torch.testing.assert_close(ours, theirs)
    assert not called


@needs_native
@pytest.mark.parametrize('onednn', [True], indirect=True)
@pytest.mark.parametrize('form', FORMS)
def test_where_onednn_keeps_out(onednn, called, form):
    """Graphs, transforms, autocast, other dtypes and empty tensors are PyTorch's."""
    function, other, shapes = FORMS[form]
    tensors = [torch.randn(shape) for shape in shapes]
    expected = other(*tensors)
    with torch.no_grad():
        traced = torch.jit.trace(function, tuple(tensors), check_trace=False)
        torch.testing.assert_close(traced(*tensors), expected)
        torch.compile(function, backend='eager', fullgraph=True)(*tensors)
        torch.func.vmap(function)(*(t[None] for t in tensors))
        doubles = [t.double() for t in tensors]
        assert function(*doubles).dtype == torch.float64
        with torch.autocast('cpu', torch.bfloat16):
            function(*tensors)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            assert function(*fakes).shape == expected.shape
        empty = [t[..., :0, :] if t.dim() > 1 and t.size(-2) == 5 else t for t in tensors]
        assert function(*empty).shape == other(*empty).shape
    assert not called
