"""X-volution: convolution and self-attention in two branches that merge into one convolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import local_attention
from ..ops._batch_norm import batch_norm_affine
from ..ops._checks import check_positive
from ..ops._dispatch import check_backend
from ..ops._reflection import reflect
from .conv_arguments import check_divisible, set_conv_attributes
from .deployable import Deployable
from .norms import build_batch_norm

ATTENTIONS = ('pixel_shift', 'local')
NEIGHBOURS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


class XVolution(Deployable):
    r"""X-volution ("On the unification of convolution and self-attention", arXiv 2106.02253).

    Drop-in for a same-padded ``nn.Conv2d``, also by ``conv_cfg=dict(type='XVolution')``, where 1x1
    convolutions stay plain unless ``replace_1x1=True`` is added, or, in mmdet's ResNet, by
    ``dcn=dict(type='XVolution')`` with ``stage_with_dcn``. The sum of two branches (section 3.3): a
    convolution with a batch norm, and self-attention with another. For inference,
    :meth:`switch_to_deploy` merges them into one dynamic convolution.

    **Pixel-shift self-attention** (PSSA, section 3.2) is the paper's approximation of global
    self-attention at a cost linear in the pixels. The map :math:`x` is shifted by :math:`L` pixels
    in several directions, every shifted map is multiplied with the map itself, and a convolution
    with weights :math:`V_\delta`, one matrix an offset, combines the products:

    .. math:: a(p) = \sum_\delta V_\delta \, (x(p) \odot x(p + \delta)).

    **The merge.** A product with :math:`x(p)` is a product with a diagonal matrix, so that
    :math:`a(p) = \sum_\delta (V_\delta \, \mathrm{diag}\, x(p)) \, x(p + \delta)`: a convolution of
    :math:`x`, whose kernel depends on the content at :math:`p`. In evaluation mode a batch norm
    multiplies each output channel by a factor :math:`f` and adds a shift :math:`b`. With
    :math:`W_\delta` for the weights of the convolution branch, the sum of both is therefore

    .. math::
        y(p) = \sum_\delta \left(f_c W_\delta + f_a V_\delta \, \mathrm{diag}\, x(p)\right)
        x(p + \delta) + b_c + b_a,

    one convolution with static plus content-dependent weights and one bias.
    :meth:`dynamic_kernel` returns that kernel. It has :math:`C` weights an output channel, offset
    and pixel, so computation never forms it: the products go through a 1x1 convolution with
    :math:`f_a V`.

    **Local self-attention** is the paper's variant with self-attention itself, X-volution (SA),
    here in a reflect-padded neighbourhood (:func:`acmix_mm.ops.local_attention`): linear
    projections to query, key and value, no position encoding, no output projection, since a
    convolution follows in every block. For an output channel of head :math:`n` with value weights
    :math:`v` and attention probabilities :math:`\pi_n(p, \delta)`, the content-dependent weights
    are :math:`f_a \pi_n(p, \delta) v`. The projections need no bias: the key's cancels in the
    softmax, the value's is the batch norm's shift.

    What the paper leaves open, and how it is read here:

    * Directions and :math:`L`: by default all eight neighbours at one pixel, the neighbourhood of
      a 3x3 convolution, so that the merged kernel has its size, too.
    * Stacking, which carries context beyond the neighbours: the shift is applied again and again.
      Step t compares with the pixels :math:`t L` away, and the combining convolution weights all
      steps; the products stay second order, and so the merge exact. One step by default, as blocks
      are stacked already.
    * The combining convolution is 1x1; the offsets make the neighbourhood. Its weights stand for
      the product of all projections, and weight channels one by one where the paper's formula for
      the dynamic weights, :math:`w_q w_k w_v \langle x_0, x_i \rangle`, has an inner product.
    * Borders: pixels beyond the map are zeros, as in the convolution.
    * Stride drops query pixels and outputs, not what they are compared with; dilation multiplies
      the offsets of both branches.

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels, a multiple of ``groups``.
        kernel_size (int | tuple[int, int]): Side of the convolution branch's kernel, odd.
            Default: 3.
        stride (int | tuple[int, int]): Stride of both branches. Default: 1.
        padding (str | int | tuple[int, int]): 'same', or its value in pixels,
            ``dilation * (kernel_size // 2)``; other values are refused. Default: 'same'.
        dilation (int | tuple[int, int]): Dilation of both branches. Default: 1.
        groups (int): Groups of the convolutions of both branches, as in ``nn.Conv2d``. Default: 1.
        bias (bool): As ``nn.Conv2d`` has it, without effect: the batch norms' shifts are one.
            Default: False.
        attention (str): 'pixel_shift' or 'local'. Default: 'pixel_shift'.
        directions (Sequence[tuple[int, int]]): Of 'pixel_shift': steps (down, right) to the
            neighbours that a pixel is compared with, each -1, 0 or 1. Default: all eight.
        shift (int): Of 'pixel_shift': length L of a step in pixels, times dilation. Default: 1.
        num_steps (int): Of 'pixel_shift': steps in every direction. Default: 1.
        num_heads (int): Of 'local': attention heads, a divisor of ``out_channels``. Default: 4.
        attn_kernel_size (int): Of 'local': side of the neighbourhood, odd. Default: 7.
        backend (str | None): Of :func:`acmix_mm.ops.local_attention`. Default: None.
        norm_cfg (dict | None): Of the two batch norms, as OpenMMLab writes it: ``type`` 'BN' or
            'SyncBN', arguments of the class, and ``requires_grad``. Default: None, for
            ``dict(type='BN')``.
        device (torch.device | str | None): Of the parameters, as in ``nn.Conv2d``. Default: None.
        dtype (torch.dtype | None): Of the parameters, as in ``nn.Conv2d``. Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    deployed_names = ('conv.bias',)

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
        attention: str = 'pixel_shift',
        directions: Sequence[tuple[int, int]] = NEIGHBOURS,
        shift: int = 1,
        num_steps: int = 1,
        num_heads: int = 4,
        attn_kernel_size: int = 7,
        backend: str | None = None,
        norm_cfg: dict | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        set_conv_attributes(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        if attention not in ATTENTIONS:
            raise ValueError(f'attention must be one of {ATTENTIONS}, got {attention!r}')
        check_backend(backend)
        super().__init__()
        shape = (in_channels, out_channels, self.stride[0], self.dilation[0], groups)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            groups,
            bias=False,
        )
        self.conv_norm = build_batch_norm(norm_cfg, out_channels)
        if attention == 'pixel_shift':
            self.attn = PixelShiftAttention(*shape, directions, shift, num_steps)
        else:
            self.attn = LocalAttention(*shape, num_heads, attn_kernel_size, backend)
        self.attn_norm = build_batch_norm(norm_cfg, out_channels)
        if (device, dtype) != (None, None):
            self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).

        Without B where the input has none.
        """
        if x.ndim == 3:
            return self.forward(x[None])[0]
        return self.conv_norm(self.conv(x)) + self.attn_norm(self.attn(x))

    @torch.no_grad()
    def dynamic_kernel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The dynamic convolution that equals the layer in evaluation mode, written out.

        To look at, not to compute with: it is larger than the map by the number of weights of a
        convolution.

        Args:
            x (Tensor): Shape (B, in_channels, H, W).

        Returns:
            tuple[Tensor, Tensor]: Kernel (B, Hq, Wq, out_channels, in_channels / groups, K, K) and
            bias (out_channels,), with Hq = ceil(H / stride) and Wq = ceil(W / stride).
            ``kernel[b, y, x]`` are the weights of the convolution that gives the output at (y, x):
            its centre is the input pixel (stride * y, stride * x), its taps are one pixel apart,
            pixels beyond the border are zeros. K is the smallest that holds both branches.
        """
        weight, factor, bias = self._folded()
        dilation = self.dilation[0]
        reach = max(self.padding[0], self.attn.reach)
        dynamic = self.attn.kernel(x) * factor.view(-1, 1, 1, 1)
        dynamic = F.pad(dynamic, (reach - self.attn.reach,) * 4)
        static = dynamic.new_zeros(*weight.shape[:2], *dynamic.shape[-2:])
        start, stop = reach - self.padding[0], reach + self.padding[0] + 1
        static[..., start:stop:dilation, start:stop:dilation] = weight
        return static + dynamic, bias

    def extra_repr(self) -> str:
        return f'deployed={self.deployed}'

    def fold(self, norm: nn.Module | None) -> None:
        weight, factor, bias = self._folded()
        if norm is not None:
            norm_factor, norm_shift = batch_norm_affine(norm)
            weight = weight * norm_factor.view(-1, 1, 1, 1)
            factor, bias = factor * norm_factor, bias * norm_factor + norm_shift
        self.conv.weight.copy_(weight)
        self.conv.bias = nn.Parameter(bias)
        self.attn.weight.mul_(factor.view(-1, 1, 1, 1))
        self.conv_norm, self.attn_norm = nn.Identity(), nn.Identity()

    def _folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Static weights, factor (C,) of the attention branch and bias (C,), norms folded."""
        if self.deployed:
            return self.conv.weight, torch.ones_like(self.conv.bias), self.conv.bias
        factor, shift = batch_norm_affine(self.conv_norm)
        attn_factor, attn_shift = batch_norm_affine(self.attn_norm)
        return self.conv.weight * factor.view(-1, 1, 1, 1), attn_factor, shift + attn_shift


class PixelShiftAttention(nn.Module):
    """Products of the map with itself, shifted, combined by a 1x1 convolution (PSSA).

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels.
        stride (int): Of the query pixels.
        dilation (int): Factor on all shifts.
        groups (int): Of the convolution.
        directions (Sequence[tuple[int, int]]): See :class:`XVolution`.
        shift (int): See :class:`XVolution`.
        num_steps (int): See :class:`XVolution`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        directions: Sequence[tuple[int, int]],
        shift: int,
        num_steps: int,
    ):
        super().__init__()
        directions = tuple(map(tuple, directions))
        if not directions or len({*directions} & {*NEIGHBOURS}) < len(directions):
            raise ValueError(f'directions must be different ones of {NEIGHBOURS}, got {directions}')
        check_positive('shift', shift)
        check_positive('num_steps', num_steps)
        self.stride = stride
        lengths = range(shift * dilation, shift * dilation * num_steps + 1, shift * dilation)
        self.offsets = tuple((y * length, x * length) for length in lengths for y, x in directions)
        self.reach = lengths[-1]
        self.conv = nn.Conv2d(
            in_channels * len(self.offsets), out_channels, 1, groups=groups, bias=False
        )

    @property
    def weight(self) -> Tensor:
        """What the result is linear in, (out_channels, ...)."""
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        height, width = x.shape[-2:]
        query = x[..., :: self.stride, :: self.stride]
        padded = F.pad(x, (self.reach,) * 4)
        products = []
        for down, right in self.offsets:
            top, left = self.reach + down, self.reach + right
            shifted = padded[..., top : top + height, left : left + width]
            products.append(query * shifted[..., :: self.stride, :: self.stride])
        # Offsets of a channel side by side, so that groups of channels stay together.
        return self.conv(torch.stack(products, 2).flatten(1, 2))

    def kernel(self, x: Tensor) -> Tensor:
        """See :meth:`XVolution.dynamic_kernel`; K is ``2 * reach + 1``."""
        groups = self.conv.groups
        weight = self.weight.unflatten(1, (-1, len(self.offsets)))  # (O, C / groups, offsets, 1, 1)
        query = x[..., :: self.stride, :: self.stride].unflatten(1, (groups, -1))
        query = query.repeat_interleave(len(weight) // groups, 1)  # (B, O, C / groups, Hq, Wq)
        side = 2 * self.reach + 1
        kernel = x.new_zeros(len(x), *query.shape[-2:], *weight.shape[:2], side, side)
        for i, (down, right) in enumerate(self.offsets):
            taps = (weight[:, :, i] * query).permute(0, 3, 4, 1, 2)
            kernel[..., self.reach + down, self.reach + right] = taps
        return kernel

    def extra_repr(self) -> str:
        return f'offsets={self.offsets}, stride={self.stride}'


class LocalAttention(nn.Module):
    """Multi-head self-attention in a reflect-padded neighbourhood.

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels.
        stride (int): Of the query pixels.
        dilation (int): Of the neighbourhood.
        groups (int): Of the projections.
        num_heads (int): See :class:`XVolution`.
        kernel_size (int): ``attn_kernel_size`` of :class:`XVolution`.
        backend (str | None): See :class:`XVolution`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        num_heads: int,
        kernel_size: int,
        backend: str | None,
    ):
        super().__init__()
        check_positive('num_heads', num_heads)
        check_positive('attn_kernel_size', kernel_size, odd=True)
        check_divisible('out_channels', out_channels, 'num_heads', num_heads)
        self.stride = stride
        self.dilation = dilation
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.backend = backend
        self.reach = kernel_size // 2 * dilation
        options = {'groups': groups, 'bias': False}
        self.query = nn.Conv2d(in_channels, out_channels, 1, stride, **options)
        self.key = nn.Conv2d(in_channels, out_channels, 1, **options)
        self.value = nn.Conv2d(in_channels, out_channels, 1, **options)

    @property
    def weight(self) -> Tensor:
        """What the result is linear in, (out_channels, ...)."""
        return self.value.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        query, key, value = (
            projection(x).unflatten(1, (self.num_heads, -1))
            for projection in (self.query, self.key, self.value)
        )
        return local_attention(
            query, key, value, self.kernel_size, self.stride, self.dilation, backend=self.backend
        ).flatten(1, 2)

    def kernel(self, x: Tensor) -> Tensor:
        """See :meth:`XVolution.dynamic_kernel`; K is ``2 * reach + 1``.

        Reflection is part of it: a tap beyond the border adds to the one that it is reflected to,
        which is never farther from the query pixel.
        """
        query, key = (p(x).unflatten(1, (self.num_heads, -1)) for p in (self.query, self.key))
        taps = torch.arange(-self.reach, self.reach + 1, self.dilation, device=x.device)
        pixels, steps = [], []  # of each axis, (Hq, k) and (Wq, k)
        for size in x.shape[-2:]:
            centres = torch.arange(0, size, self.stride, device=x.device)[:, None]
            pixels.append(reflect(centres + taps, size))
            steps.append(pixels[-1] - centres + self.reach)
        rows, columns = pixels[0][:, None, :, None], pixels[1][:, None]
        logits = torch.einsum('bndyx,bndyxij->bnyxij', query, key[..., rows, columns])
        probabilities = (logits * query.size(2) ** -0.5).flatten(4).softmax(-1)

        side = 2 * self.reach + 1
        index = (steps[0][:, None, :, None] * side + steps[1][:, None]).flatten(2)
        window = probabilities.new_zeros(*probabilities.shape[:4], side**2)
        window.scatter_add_(-1, index.expand_as(probabilities), probabilities)
        value = self.weight.flatten(1).unflatten(0, (self.num_heads, -1))
        kernel = torch.einsum('bnyxk,ndc->byxndck', window, value)
        return kernel.flatten(3, 4).unflatten(-1, (side, side))

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, kernel_size={self.kernel_size}, '
            f'stride={self.stride}, dilation={self.dilation}, backend={self.backend!r}'
        )
