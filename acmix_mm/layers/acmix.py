"""ACmix with neighbourhood attention, the drop-in for a convolution."""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import check_backend, check_positive, local_attention
from .mixed_operator import MixedOperator


def _square(name: str, value: int | tuple[int, int]) -> int:
    """One integer from an integer or a pair of equal integers, as configs give either."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f'{name} must be an integer or a pair of equal integers, got {value}')
        value = value[0]
    return value


@MODELS.register_module()
class ACmix(MixedOperator):
    r"""Mix of neighbourhood attention and convolution over shared projections.

    "On the Integration of Self-Attention and Convolution", CVPR 2022, section 4. Drop-in for a
    same-padded ``nn.Conv2d``, also by ``conv_cfg=dict(type='ACmix')`` or, in mmdet's ResNet and
    ResNeXt, by ``dcn=dict(type='ACmix')`` with ``stage_with_dcn``.

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
    :func:`acmix_mm.ops.shift_conv`.

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
        backend (str | None): Of :func:`acmix_mm.ops.local_attention`. Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

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
        backend: str | None = None,
    ):
        kernel_size = _square('kernel_size', kernel_size)
        stride = _square('stride', stride)
        dilation = _square('dilation', dilation)
        check_positive('kernel_size', kernel_size, odd=True)
        check_positive('attn_kernel_size', attn_kernel_size, odd=True)
        for name, value in (
            ('in_channels', in_channels),
            ('out_channels', out_channels),
            ('stride', stride),
            ('dilation', dilation),
            ('groups', groups),
            ('num_heads', num_heads),
        ):
            check_positive(name, value)
        for channels, value, divisor, number in (
            ('out_channels', out_channels, 'num_heads', num_heads),
            ('in_channels', in_channels, 'groups', groups),
            ('out_channels', out_channels, 'groups', groups),
        ):
            if value % number:
                raise ValueError(
                    f'{channels} must be divisible by {divisor} ({number}), got {value}'
                )
        same = dilation * (kernel_size // 2)
        if padding != 'same' and _square('padding', padding) != same:
            raise ValueError(
                f"padding must be 'same' or {same} for kernel_size {kernel_size} and dilation "
                f'{dilation}, got {padding!r}'
            )
        check_backend(backend)
        head_dim = out_channels // num_heads
        super().__init__(out_channels, 3 * num_heads, head_dim, kernel_size, mix)
        # Attributes of nn.Conv2d, which mmcv's ConvModule and others read.
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = (stride, stride)
        self.padding = (same, same)
        self.output_padding = (0, 0)
        self.dilation = (dilation, dilation)
        self.groups = groups
        self.transposed = False

        self.num_heads = num_heads
        self.head_dim = head_dim
        self.attn_kernel_size = attn_kernel_size
        self.backend = backend
        for name in ('conv1', 'conv2', 'conv3'):  # projections to query, key and value
            weight = torch.empty(out_channels, in_channels // groups, 1, 1)
            nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')
            setattr(
                self,
                name,
                nn.ParameterDict({'weight': weight, 'bias': torch.zeros(out_channels)}),
            )
        if self.with_attention:
            conv_p = torch.empty(head_dim, 2, 1, 1)
            nn.init.kaiming_uniform_(conv_p, a=5**0.5)
            self.conv_p = nn.ParameterDict({'weight': conv_p})
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_load_state_dict_pre_hook(_drop_position_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        stride, dilation = self.stride[0], self.dilation[0]
        maps = self.project(x)
        convolution = attention = None
        if self.with_convolution:
            convolution = self.convolution(maps.flatten(2, 3), stride, dilation)
        if self.with_attention:
            query, key, value = maps.permute(2, 0, 3, 1, 4, 5)
            attention = local_attention(
                query[..., ::stride, ::stride],
                key - self.position_encoding(key),
                value,
                self.attn_kernel_size,
                stride,
                dilation,
                backend=self.backend,
            ).flatten(1, 2)
        if self.mix == 'attention':
            out = attention
        elif self.mix == 'conv':
            out = convolution
        else:
            out = self.combine(attention, convolution)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def project(self, x: Tensor) -> Tensor:
        """Stage I: (B, in_channels, H, W) -> (B, d, 3, N, H, W), query, key and value.

        The head position comes first, as the grouped convolution wants it; permuting the weights
        costs nothing, permuting the maps would cost a pass over memory.
        """
        projections = (self.conv1, self.conv2, self.conv3)
        weight = torch.stack([p['weight'] for p in projections])
        bias = torch.stack([p['bias'] for p in projections])
        layout = (3, self.num_heads, self.head_dim)
        if self.groups == 1:
            weight = weight.unflatten(1, layout[1:]).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
            bias = bias.view(layout).permute(2, 0, 1).flatten()
            maps = F.conv2d(x, weight, bias)
            return maps.unflatten(1, (self.head_dim, 3, self.num_heads))
        maps = torch.stack(
            [F.conv2d(x, w, b, groups=self.groups) for w, b in zip(weight, bias, strict=True)], 1
        )
        maps = maps.unflatten(2, layout[1:]).permute(0, 3, 1, 2, 4, 5)
        return maps.contiguous()

    def position_encoding(self, key: Tensor) -> Tensor:
        """(d, H, W): ``conv_p`` of the coordinates (x, y), linspace(-1, 1) over width and height.

        In the dtype and on the device of ``key`` (B, N, d, H, W).
        """
        height, width = key.shape[-2:]
        weight_x, weight_y = self.conv_p['weight'].view(-1, 2, 1, 1).unbind(1)
        x = torch.linspace(-1, 1, width, device=key.device, dtype=weight_x.dtype)
        y = torch.linspace(-1, 1, height, device=key.device, dtype=weight_y.dtype)
        return (weight_x * x + weight_y * y[:, None]).to(key.dtype)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
            f'stride={self.stride}, dilation={self.dilation}, groups={self.groups}, '
            f'num_heads={self.num_heads}, attn_kernel_size={self.attn_kernel_size}, '
            f'mix={self.mix!r}'
        )


def _drop_position_bias(module, state_dict, prefix, *args) -> None:
    """Published checkpoints hold a bias that the softmax cancels."""
    state_dict.pop(f'{prefix}conv_p.bias', None)
