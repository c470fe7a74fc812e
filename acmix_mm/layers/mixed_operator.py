"""What all operators that mix attention and convolution share."""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import check_positive, shift_conv, shift_kernel

MIX_MODES = ('learned', 'complementary', 'sum', 'attention', 'conv')


class MixedOperator(BaseModule):
    """Convolution path and combination of the two paths (ACmix, CVPR 2022, section 4).

    The output is ``rate1 * attention + rate2 * convolution``. Subclasses project the input to
    query, key and value, compute the attention path, and call :meth:`convolution` and
    :meth:`combine`.

    Parameters are held outside ``nn.Conv2d`` modules on purpose: the generic initialisation of the
    model around the operator, which matches layers by class name, would overwrite the shift
    initialisation of ``dep_conv`` otherwise. State-dict names are the published ones.

    Args:
        out_channels (int): Output channels C, a multiple of ``head_dim``.
        num_maps (int): Maps that the convolution path mixes: 3 N for N heads.
        head_dim (int): Channels of a head, d.
        kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        mix (str): How the paths are combined (section 5.4, ablation of the combination):
            'learned' (rate1 and rate2 are free parameters, 0.5 at the start), 'complementary'
            (rate1 is, rate2 = 1 - rate1), 'sum' (both are 1), or one path only: 'attention',
            'conv'. Default: 'learned'.
    """

    def __init__(
        self,
        out_channels: int,
        num_maps: int,
        head_dim: int,
        kernel_size: int = 3,
        mix: str = 'learned',
    ):
        super().__init__()
        check_positive('kernel_size', kernel_size, odd=True)
        if mix not in MIX_MODES:
            raise ValueError(f'mix must be one of {MIX_MODES}, got {mix!r}')
        self.mix = mix
        if self.with_convolution:
            positions = kernel_size**2
            fc = torch.empty(positions, num_maps, 1, 1)
            nn.init.kaiming_uniform_(fc, a=5**0.5)  # nn.Conv2d's own initialisation
            self.fc = nn.ParameterDict({'weight': fc})
            self.dep_conv = nn.ParameterDict(
                {'weight': shift_kernel(out_channels, head_dim, kernel_size)}
            )
        if mix in ('learned', 'complementary'):
            self.rate1 = nn.Parameter(torch.full((1,), 0.5))
        if mix == 'learned':
            self.rate2 = nn.Parameter(torch.full((1,), 0.5))

    @property
    def with_attention(self) -> bool:
        return self.mix != 'conv'

    @property
    def with_convolution(self) -> bool:
        return self.mix != 'attention'

    def convolution(self, maps: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        """Convolution path with its rate: (B, d, 3N, H, W) -> (B, C, H / stride, W / stride)."""
        weight = self.fc['weight'].flatten(1)
        # The path is linear, so its rate goes into the smallest of its factors.
        if self.mix == 'learned':
            weight = weight * self.rate2
        elif self.mix == 'complementary':
            weight = weight * (1 - self.rate1)
        return shift_conv(maps, weight, self.dep_conv['weight'], stride, dilation)

    def combine(self, attention: Tensor, convolution: Tensor) -> Tensor:
        """Sum of the attention path, times its rate, and :meth:`convolution`'s result."""
        if self.mix == 'sum':
            return attention + convolution
        return torch.addcmul(convolution, attention, self.rate1.to(attention.dtype))
