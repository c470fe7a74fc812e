"""ACmix with neighbourhood attention, the drop-in for a convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import fused_acmix
from ..ops._checks import check_positive
from ..ops.fused_acmix import attention_path
from .conv_arguments import check_divisible, set_conv_attributes
from .mixed_operator import MixedOperator
from .mixing_weights import MixingWeights, folding_pays


class ACmix(MixedOperator):
    r"""Mix of neighbourhood attention and convolution over shared projections.

    "On the Integration of Self-Attention and Convolution", CVPR 2022, section 4. Drop-in for a
    same-padded ``nn.Conv2d``, also by ``conv_cfg=dict(type='ACmix')``, which leaves 1x1 and some
    other convolutions plain (docs/other_models.md), or, in mmdet's ResNet and ResNeXt, by
    ``dcn=dict(type='ACmix')`` with ``stage_with_dcn``.

    Stage I projects the input to query, key and value with three 1x1 convolutions. Stage II sends
    them through two paths: multi-head attention in a reflect-padded neighbourhood, and ``fc`` with
    a shift convolution, zero padded. The paths are weighted by two learned scalars and summed.
    Weights of the authors' release load as they are, including its quirks: the attention path's
    channel is ``head * d + position``, the convolution path's ``position * N + head``.

    Two identities replace the release's large intermediate maps. In the logit
    :math:`q_i \cdot (k_j + p_i - p_j)`, :math:`q_i \cdot p_i` does not depend on j and drops out of
    the softmax, and so does the bias of ``conv_p``: the position encoding is
    :math:`k_j - W_p (x_j, y_j)` before plain attention. ``conv_p.bias`` therefore has no effect and
    does not exist here; loading drops it. ``fc`` and the shift convolution are folded, see
    :class:`~acmix_mm.layers.mixing_weights.MixingWeights`.

    Where it deviates from the release: any H, W >= 1 works at any stride, output sizes are
    ceil(H / stride) and ceil(W / stride), and dilation applies to both paths.

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels, a multiple of ``num_heads`` and of ``groups``.
        kernel_size (int | tuple[int, int]): Side of the convolution path's kernel, odd.
            Default: 3.
        stride (int | tuple[int, int]): Stride of both paths. Default: 1.
        padding (str | int | tuple[int, int]): 'same', or its value in pixels,
            ``dilation * (kernel_size // 2)``; other values are refused. Default: 'same'.
        dilation (int | tuple[int, int]): Dilation of both paths. Default: 1.
        groups (int): Groups of the three projections, as in ``nn.Conv2d``. Default: 1.
        bias (bool): Adds a learned bias to the output, as in ``nn.Conv2d``. The projections have
            theirs regardless. Default: False.
        num_heads (int): Heads N of the attention. Default: 4.
        attn_kernel_size (int): Side of the attention's neighbourhood, odd. Default: 7.
        mix (str): See :class:`MixedOperator`. Default: 'learned'.
        shift (str): See :class:`MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): See :class:`MixedOperator`. Default: None.
        backend (str | None): Of :func:`acmix_mm.ops.local_attention`. Default: None.
        device (torch.device | str | None): Of the parameters, as in ``nn.Conv2d``. Default: None.
        dtype (torch.dtype | None): Of the parameters, as in ``nn.Conv2d``. Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    # Not 'weight': a plain convolution has one, too, whose place the layer may have taken.
    deployed_names = ('weight_bias', 'slopes', *MixedOperator.deployed_names)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 'same',
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        num_heads: int = 4,
        attn_kernel_size: int = 7,
        mix: str = 'learned',
        shift: str = 'learned',
        kernel_groups: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        set_conv_attributes(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        check_positive('num_heads', num_heads)
        check_positive('attn_kernel_size', attn_kernel_size, odd=True)
        check_divisible('out_channels', out_channels, 'num_heads', num_heads)
        super().__init__(
            out_channels,
            num_maps=3 * num_heads,
            head_dim=out_channels // num_heads,
            kernel_size=self.kernel_size[0],
            stride=self.stride[0],
            dilation=self.dilation[0],
            bias=bias,
            mix=mix,
            backend=backend,
            shift=shift,
            kernel_groups=kernel_groups,
        )
        self.num_heads = num_heads
        self.attn_kernel_size = attn_kernel_size
        # Both paths as one operator, where folded kernels for each output pay.
        both = self.with_attention and self.with_convolution
        self._fuses = both and folding_pays(
            3 * num_heads, out_channels, self.head_dim, self.kernel_size[0], self.stride[0]
        )
        for name in ('conv1', 'conv2', 'conv3'):  # projections to query, key and value
            weight = torch.empty(out_channels, in_channels // groups, 1, 1)
            nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')
            setattr(
                self,
                name,
                nn.ParameterDict({'weight': weight, 'bias': torch.zeros(out_channels)}),
            )
        if self.with_attention:
            conv_p = torch.empty(self.head_dim, 2, 1, 1)
            nn.init.kaiming_uniform_(conv_p, a=5**0.5)
            self.conv_p = nn.ParameterDict({'weight': conv_p})
        self.register_load_state_dict_pre_hook(_drop_position_bias)
        if (device, dtype) != (None, None):
            self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).

        Without B where the input has none.
        """
        if x.ndim == 3:
            return self.forward(x[None])[0]
        channels = self.in_channels
        if x.ndim != 4 or x.size(1) != channels:
            raise ValueError(
                f'x must have shape (B, {channels}, H, W) or ({channels}, H, W), got '
                f'{tuple(x.shape)}'
            )
        geometry = (self.attn_kernel_size, self.stride[0], self.dilation[0])
        weight, bias, slopes = self.projection_weights().values()
        mixing = self.mixing_weights()
        if self._fuses and mixing.fc is None:
            return fused_acmix(
                x, weight, bias, slopes, mixing.kernel, mixing.bias, mixing.scale,
                self.num_heads, *geometry, backend=self.backend,
            )  # fmt: skip
        maps = F.conv2d(x, weight, bias).unflatten(1, (self.head_dim, 3, self.num_heads))
        attention = None
        if self.with_attention:
            attention = attention_path(maps, slopes, *geometry, self.backend)
        return mixing.mix(maps.flatten(2, 3), attention, self.backend)

    def mixing_weights(self) -> MixingWeights:
        """Weights of Stage II; where both paths are one operator, with a kernel for each output."""
        weights = super().mixing_weights()
        return weights.expanded() if self._fuses and weights.fc is None else weights

    def projection_weights(self) -> dict[str, Tensor | None]:
        """Weights of Stage I: one 1x1 convolution to query, key and value, and the position slopes.

        Returns:
            dict[str, Tensor | None]: ``weight`` (3 C, in_channels, 1, 1) and ``weight_bias``
            (3 C,), ordered as (position, query / key / value, head): what the grouped convolution
            wants, and permuting weights costs nothing, permuting maps a pass over memory.
            ``slopes`` (d, 2), ``conv_p``'s weight; None without attention.
        """
        if self.deployed:
            return {'weight': self.weight, 'weight_bias': self.weight_bias, 'slopes': self.slopes}
        projections = (self.conv1, self.conv2, self.conv3)
        weights = [p['weight'].flatten(1) for p in projections]
        if self.groups > 1:
            # One dense product is faster than three products of groups, whose channels are few.
            weights = [torch.block_diag(*weight.chunk(self.groups)) for weight in weights]
        weight, bias = (
            torch.stack([p.unflatten(0, (self.num_heads, -1)).transpose(0, 1) for p in parts], 1)
            for parts in (weights, [p['bias'] for p in projections])
        )
        return {
            'weight': weight.flatten(0, 2)[..., None, None],
            'weight_bias': bias.flatten(),
            'slopes': self.conv_p['weight'].flatten(1) if self.with_attention else None,
        }

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
            f'stride={self.stride}, dilation={self.dilation}, groups={self.groups}, '
            f'num_heads={self.num_heads}, attn_kernel_size={self.attn_kernel_size}, '
            f'{super().extra_repr()}'
        )


def _drop_position_bias(module, state_dict, prefix, *args) -> None:
    """Published checkpoints hold a bias that the softmax cancels."""
    state_dict.pop(f'{prefix}conv_p.bias', None)
