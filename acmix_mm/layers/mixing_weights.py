"""Weights of Stage II of the mixed operators: what both paths end with, folded and applied."""

from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import group_conv
from ..ops._batch_norm import batch_norm_affine


def shift_kernel(out_channels: int, groups: int, kernel_size: int) -> Tensor:
    """Kernel with which the grouped convolution sums ``kernel_size ** 2`` shifted maps.

    Input channel i of every group carries the map for kernel position i; it has a 1 there and 0
    elsewhere (ACmix, section 4.2: shift and aggregation as a convolution).

    Args:
        out_channels (int): Output channels, a multiple of ``groups``.
        groups (int): Groups of the convolution.
        kernel_size (int): Side k of the kernel, odd.

    Returns:
        Tensor: float32, shape (out_channels, k * k, k, k).
    """
    positions = kernel_size**2
    kernel = torch.eye(positions).view(positions, kernel_size, kernel_size)
    return kernel.repeat(out_channels, 1, 1, 1)


def shift_and_sum(maps: Tensor, kernel_size: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """What the convolution with :func:`shift_kernel` gives, by shifts of tensors.

    The naive formulation (ACmix, section 4.2), which the paper replaces by a convolution: each map
    is cut out of zeros around it, moved by its kernel position, and added.

    Args:
        maps (Tensor): Shape (B, d, k * k, H, W), one map for each kernel position.
        kernel_size (int): Side k of the kernel, odd.
        stride (int): Stride of the result. Default: 1.
        dilation (int): Pixels from one kernel position to the next. Default: 1.

    Returns:
        Tensor: Shape (B, d, ceil(H / stride), ceil(W / stride)).
    """
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (kernel_size // 2 * dilation,) * 4)
    shifted = (
        padded[:, :, row * kernel_size + col, y : y + height : stride, x : x + width : stride]
        for row in range(kernel_size)
        for col in range(kernel_size)
        for y, x in [(row * dilation, col * dilation)]
    )
    return reduce(torch.add, shifted)


def folding_pays(
    num_maps: int, num_kernels: int, groups: int, kernel_size: int, stride: int = 1
) -> bool:
    """Does the folded convolution have no more multiplications than ``fc`` and its convolution?

    Folded, an output pixel takes ``k^2 M`` of them a kernel. In two steps, ``fc`` takes ``k^2 M``
    for each input pixel and head position, then the convolution ``k^4`` a kernel.
    """
    positions = kernel_size**2
    folded = positions * num_maps * num_kernels
    two_steps = positions * num_maps * groups * stride**2 + positions**2 * num_kernels
    return folded <= two_steps


TENSORS = ('fc', 'fc_bias', 'kernel', 'scale', 'bias')  # of MixingWeights, in a state dict


@dataclass(frozen=True)
class MixingWeights:
    r"""Weights of Stage II of ACmix (CVPR 2022, section 4.2).

    The convolution path mixes the M maps of every head position by ``fc`` and sends the result
    through a grouped convolution, with one group a head position, that shifts and sums:
    both are linear, so that one convolution equals the two, with
    ``W[g, o, i] = sum_m kernel[g, o, m] fc[m, i]``. What belongs to a path that is not there is
    None.

    Args:
        kernel (Tensor | None): Kernels of the grouped convolution, shape (K, k * k, k, k); folded
            with ``fc``, (K, M, k, k). K is C, or a part of it where adjacent outputs share a
            kernel. None: no convolution path.
        fc (Tensor | None): Shape (k * k, M); None where it is folded. Default: None.
        fc_bias (Tensor | None): Added to the maps that ``fc`` mixes, before zeros are padded, shape
            (k * k,); folded, the bias's own kernels, (K, 1, k, k). Default: None.
        scale (Tensor | None): Factor on the attention path, shape (1,) or (C,); None is 1, or no
            such path. Default: None.
        bias (Tensor | None): Added to the result, shape (C,). Default: None.
        groups (int): Groups of the convolution: head positions d. Default: 1.
        stride (int): Of the convolution. Default: 1.
        dilation (int): Of the convolution. Default: 1.
        channels (int | None): Output channels C; None is K. Default: None.
        tensor_shifts (bool): The kernels are those of :func:`shift_kernel`, one a group, and
            :func:`shift_and_sum` takes the place of the convolution. Default: False.
    """

    kernel: Tensor | None
    fc: Tensor | None = None
    fc_bias: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    channels: int | None = None
    tensor_shifts: bool = False

    def tensors(self) -> dict[str, Tensor | None]:
        """The weights by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def folded(self) -> 'MixingWeights':
        """The same with ``fc`` and its bias in the kernels."""
        if self.fc is None:
            return self
        fc_bias = None if self.fc_bias is None else self._fold(self.fc_bias[:, None])
        kernel = self._fold(self.fc)
        return replace(self, kernel=kernel, fc=None, fc_bias=fc_bias, tensor_shifts=False)

    def _fold(self, fc: Tensor) -> Tensor:
        """(k * k, M) -> (K, M, k, k)."""
        kernel = self.kernel.unflatten(0, (self.groups, -1))
        return torch.einsum('gompq,mi->goipq', kernel, fc).flatten(0, 1).contiguous()

    @property
    def sharing(self) -> int:
        """How many adjacent outputs share a kernel, C / K."""
        return 1 if self.channels is None else self.channels // self.kernel.size(0)

    def expanded(self) -> 'MixingWeights':
        """The same with a kernel for each output."""
        if self.kernel is None or self.sharing == 1:
            return self
        kernel, fc_bias = self.kernel.repeat_interleave(self.sharing, 0), self.fc_bias
        if self.fc is None and fc_bias is not None:
            fc_bias = fc_bias.repeat_interleave(self.sharing, 0)
        return replace(self, kernel=kernel, fc_bias=fc_bias, tensor_shifts=False)

    def times(self, rate: Tensor) -> 'MixingWeights':
        """The convolution path times ``rate``, (1,): in the smallest of its factors."""
        fc_bias = None if self.fc_bias is None else self.fc_bias * rate
        return replace(self, fc=self.fc * rate, fc_bias=fc_bias)

    def followed_by(self, norm: nn.Module) -> 'MixingWeights':
        """The same with a batch norm in evaluation mode that is applied to the result."""
        factor, shift = batch_norm_affine(norm)
        per_kernel = factor.view(-1, 1, 1, 1)
        weights = self.expanded()  # the norm has a factor for each output
        kernel, fc_bias, bias = weights.kernel, weights.fc_bias, weights.bias
        if kernel is not None:
            kernel = kernel * per_kernel
            if self.fc is None and fc_bias is not None:
                fc_bias = fc_bias * per_kernel
        return replace(
            self,
            kernel=kernel,
            fc_bias=fc_bias,
            scale=None if self.scale is None else self.scale * factor,
            bias=shift if bias is None else bias * factor + shift,
            tensor_shifts=False,
        )

    def convolve(self, maps: Tensor, backend: str | None = None) -> Tensor:
        """The convolution path, and the result's bias.

        Args:
            maps (Tensor): Shape (B, d, M, H, W): batch, head positions, maps (query, key and value
                of all heads: M = 3 N), height, width.
            backend (str | None): Of :func:`acmix_mm.ops.group_conv`. Default: None.

        Returns:
            Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)). Channel ``g * (C / d) + o`` is
            output o of head position g.
        """
        geometry, bias = (self.stride, self.dilation), self.bias
        inputs = maps if self.fc is None else self._mix_maps(maps)
        if self.tensor_shifts:
            out = shift_and_sum(inputs, self.kernel.size(-1), *geometry)
        elif self.sharing == 1:
            out, bias = group_conv(inputs, self.kernel, *geometry, bias, backend), None
        else:
            out = group_conv(inputs, self.kernel, *geometry, None, backend)
        if self.fc is None and self.fc_bias is not None:
            out = out + self._bias_map(maps).to(out.dtype)
        if self.sharing > 1:
            out = out.unsqueeze(2).expand(-1, -1, self.sharing, -1, -1).flatten(1, 2)
        return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)

    def _mix_maps(self, maps: Tensor) -> Tensor:
        """``fc`` on every head position, (B, d, M, H, W) -> (B, d, k * k, H, W)."""
        # Not matmul: in training it copies the maps, channels last, to make one product of all.
        pixels = maps.flatten(3).flatten(0, 1)
        weight = self.fc.expand(pixels.size(0), -1, -1)
        if self.fc_bias is None:
            mixed = torch.bmm(weight, pixels)
        else:
            mixed = torch.baddbmm(self.fc_bias[:, None], weight, pixels)
        return mixed.view(*maps.shape[:2], self.fc.size(0), *maps.shape[3:])

    def _bias_map(self, maps: Tensor) -> Tensor:
        """What the folded bias of ``fc`` adds: constant but near the border, where zeros count.

        Shape (1, K, ceil(H / stride), ceil(W / stride)).
        """
        kernel = self.fc_bias
        taps = torch.arange(kernel.size(-1), device=kernel.device) - kernel.size(-1) // 2
        rows, cols = (  # (outputs, k): is there a pixel under the tap?
            ((positions >= 0) & (positions < length)).to(kernel.dtype)
            for length in maps.shape[3:]
            for positions in [
                torch.arange(0, length, self.stride, device=kernel.device)[:, None]
                + taps * self.dilation
            ]
        )
        return (rows @ kernel[:, 0] @ cols.T)[None]

    def mix(self, maps: Tensor | None, attention: Tensor | None, backend: str | None) -> Tensor:
        """The result from projected maps and the attention path.

        Args:
            maps (Tensor | None): See :meth:`convolve`; not looked at without a convolution path.
            attention (Tensor | None): Shape (B, C, ceil(H / stride), ceil(W / stride)); None
                without an attention path.
            backend (str | None): See :meth:`convolve`.

        Returns:
            Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)).
        """
        scale = None
        if self.scale is not None:
            scale = self.scale.to(attention.dtype).view(-1, 1, 1)
        if self.kernel is None:
            out = attention if scale is None else attention * scale
            return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)
        convolution = self.convolve(maps, backend)
        return convolution if attention is None else torch.addcmul(convolution, attention, scale)
