import pytest
import torch

from acmix_mm.ops import available_backends, check_backend, local_attention, select_backend
from acmix_mm.ops.selection import BACKEND_VARIABLE

CPU = torch.zeros(1)


def test_argument_then_variable_then_device(monkeypatch):
    automatic = 'native' if 'native' in available_backends() else 'torch'
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert select_backend(None, CPU) == automatic
    monkeypatch.setenv(BACKEND_VARIABLE, '')
    assert select_backend(None, CPU) == automatic
    monkeypatch.setenv(BACKEND_VARIABLE, 'torch')
    assert select_backend(None, CPU) == 'torch'
    assert select_backend(automatic, CPU) == automatic


def test_wrong_names_are_refused_with_their_source(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'cuda'"):
        check_backend('cuda')
    monkeypatch.setenv(BACKEND_VARIABLE, 'fast')
    tensor = torch.zeros(1, 1, 2, 3, 3)
    with pytest.raises(ValueError, match=rf"{BACKEND_VARIABLE} must be .* got 'fast'"):
        local_attention(tensor, tensor, tensor)


@pytest.mark.skipif('native' not in available_backends(), reason='native kernels are not built')
def test_native_is_for_the_cpu():
    with pytest.raises(ValueError, match="backend 'native' needs tensors on the CPU, got meta"):
        select_backend('native', torch.zeros(1, device='meta'))


@pytest.mark.skipif('triton' not in available_backends(), reason='Triton is not there')
def test_triton_serves_where_it_has_a_kernel():
    assert select_backend('triton', CPU) == 'torch'
    assert select_backend('triton', CPU, triton=True) == 'triton'
    with pytest.raises(ValueError, match="backend 'triton' needs float16, bfloat16 or float32"):
        select_backend('triton', CPU.double(), triton=False)
