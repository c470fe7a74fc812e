import logging

import pytest
import torch
from devices import needs_native, needs_triton
from torch._subclasses import FakeTensorMode

from acmix_mm.ops import available_backends, group_conv, local_attention
from acmix_mm.ops._dispatch import (
    BACKEND_VARIABLE,
    BACKENDS,
    OPERATORS,
    _tell_missing,
    check_backend,
    select,
)
from acmix_mm.ops.backends import native_backend, triton_backend

QUERY = torch.zeros(1, 1, 2, 3, 3)


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def on_gpu(*shape: int) -> torch.Tensor:
    """A tensor that has the device of a GPU, and nothing else, on any machine."""
    with FakeTensorMode():
        return torch.empty(shape, device='cuda')


def test_every_operator_has_a_backend_for_everything():
    assert set(OPERATORS) == {
        'local_attention', 'group_conv', 'fused_acmix', 'local_aggregation', 'patch_weights'
    }  # fmt: skip
    for implementations in OPERATORS.values():
        assert set(implementations) <= set(BACKENDS)
        assert implementations['torch'].refuses(QUERY.to(torch.complex64)) is None


def test_argument_then_variable_then_device(monkeypatch):
    automatic = 'native' if 'native' in available_backends() else 'torch'
    assert select('local_attention', None, QUERY) == automatic
    monkeypatch.setenv(BACKEND_VARIABLE, '')
    assert select('local_attention', None, QUERY) == automatic
    monkeypatch.setenv(BACKEND_VARIABLE, 'torch')
    assert select('local_attention', None, QUERY) == 'torch'
    assert select('local_attention', automatic, QUERY) == automatic


def test_names_are_the_same_on_every_machine(monkeypatch):
    """A model is built where it need not run."""
    monkeypatch.setattr(native_backend, 'MISSING', 'it was not built')
    for name in (None, *BACKENDS):
        check_backend(name)
    with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'cuda'"):
        check_backend('cuda')
    monkeypatch.setenv(BACKEND_VARIABLE, 'fast')
    with pytest.raises(ValueError, match=rf"{BACKEND_VARIABLE} must be .* got 'fast'"):
        local_attention(QUERY, QUERY, QUERY)


def test_argument_is_a_demand(monkeypatch):
    """For a backend that is not there, of operators with and without a kernel of its own."""
    monkeypatch.setattr(native_backend, 'MISSING', 'their build failed (no compiler)')
    monkeypatch.setattr(triton_backend, 'MISSING', 'there is no GPU')
    weight = torch.ones(2, 1, 3, 3)
    for backend, reason in (('native', 'no compiler'), ('triton', 'there is no GPU')):
        message = f"backend '{backend}' is not available: .*{reason}"
        with pytest.raises(ValueError, match=message):
            local_attention(QUERY, QUERY, QUERY, backend=backend)
        with pytest.raises(ValueError, match=message):
            group_conv(QUERY.transpose(1, 2), weight, backend=backend)


def test_variable_is_a_preference(monkeypatch):
    """What it names serves where it can; elsewhere the device decides, for every operator."""
    monkeypatch.setattr(triton_backend, 'MISSING', 'there is no GPU')
    monkeypatch.setenv(BACKEND_VARIABLE, 'triton')
    automatic = 'native' if 'native' in available_backends() else 'torch'
    for operator in ('local_attention', 'group_conv', 'fused_acmix'):
        assert select(operator, None, QUERY, *[QUERY] * 6) == automatic


@needs_triton
def test_preference_for_triton(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, 'triton')
    device = 'cpu' if triton_backend.INTERPRETED else 'cuda'
    automatic = 'native' if device == 'cpu' and 'native' in available_backends() else 'torch'
    query = QUERY.to(device)
    assert select('local_attention', None, query) == 'triton'
    assert select('local_attention', None, query.double()) == automatic  # no kernel for it
    assert select('group_conv', None, query) == 'triton'
    assert select('group_conv', None, query.double()) == automatic


@needs_native
def test_native_is_for_the_cpu():
    with pytest.raises(ValueError, match=r"backend 'native' of \w+ needs tensors on the CPU, got"):
        select('local_attention', 'native', on_gpu(1, 1, 2, 3, 3))
    with pytest.raises(ValueError, match='needs float64, float32, bfloat16 or float16, got'):
        select('local_attention', 'native', QUERY.to(torch.float8_e5m2))


@needs_triton
def test_triton_serves_where_it_has_a_kernel(monkeypatch):
    monkeypatch.delitem(OPERATORS['patch_weights'], 'triton')
    device = 'cpu' if triton_backend.INTERPRETED else 'cuda'
    assert select('patch_weights', 'triton', QUERY.to(device)) == 'torch'
    assert select('local_attention', 'triton', QUERY.to(device)) == 'triton'
    for operator in ('local_attention', 'group_conv'):
        with pytest.raises(ValueError, match=r"backend 'triton' of .* needs float16, bfloat16 or"):
            select(operator, 'triton', QUERY.double().to(device))


@pytest.mark.parametrize('backend', [None, *available_backends()])
def test_meta_tensors_need_no_backend(backend):
    query = QUERY.to('meta')
    assert local_attention(query, query, query, backend=backend).is_meta


def test_missing_kernels_are_told_once(monkeypatch, caplog):
    monkeypatch.setattr(native_backend, 'MISSING', 'their build failed (no compiler); install')
    _tell_missing.cache_clear()
    with caplog.at_level(logging.WARNING, 'acmix_mm'):
        for _ in range(3):
            local_attention(QUERY, QUERY, QUERY)
    _tell_missing.cache_clear()
    assert len(caplog.records) == 1
    assert 'run in PyTorch, slower: their build failed (no compiler)' in caplog.text


@pytest.mark.parametrize('reason', [None, 'CompileError: no compiler\n'])
def test_reason_of_the_build_is_kept(monkeypatch, tmp_path, reason):
    """What setup.py wrote beside the package is what users are told."""
    file = tmp_path / 'native_build.txt'
    if reason is not None:
        file.write_text(reason)
    monkeypatch.setattr(native_backend, 'REASON_FILE', file)
    monkeypatch.setattr(native_backend.importlib.util, 'find_spec', lambda name: None)
    said = native_backend._load()
    expected = 'not built' if reason is None else r'build failed (CompileError: no compiler);'
    assert expected in said
    assert 'pip install --force-reinstall' in said


def test_setup_writes_where_it_is_read(pytestconfig):
    file = '/'.join(native_backend.REASON_FILE.parts[-3:])
    assert f"REASON_FILE = '{file}'" in (pytestconfig.rootpath / 'setup.py').read_text()
