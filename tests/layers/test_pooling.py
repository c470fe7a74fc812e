import pytest
import torch
from torch.nn import functional as F

from acmix_mm.layers import LastMapPooling


@pytest.mark.parametrize('kind', [list, tuple])
def test_mean_of_the_last_map(kind):
    maps = kind([torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 5)])
    (out,) = LastMapPooling()(maps)
    torch.testing.assert_close(out, maps[-1].mean((2, 3)))


def test_norm_of_each_pixel_before_the_mean():
    x = torch.randn(2, 6, 4, 5)
    pooling = LastMapPooling(norm_channels=6)
    torch.nn.init.normal_(pooling.norm.weight)
    torch.nn.init.normal_(pooling.norm.bias)
    (out,) = pooling([x])
    weight, bias = pooling.norm.weight, pooling.norm.bias
    pixels = [F.layer_norm(x[:, :, i, j], (6,), weight, bias, 1e-6)
              for i in range(4) for j in range(5)]  # fmt: skip
    torch.testing.assert_close(out, sum(pixels) / 20)
