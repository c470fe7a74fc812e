"""ACmix with window attention, the operator of Swin-ACmix."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._autograd import spread, transformed
from .mixed_operator import ProjectedMixedOperator


class WindowACmix(ProjectedMixedOperator):
    """Mix of window attention and convolution over shared projections.

    "On the Integration of Self-Attention and Convolution", CVPR 2022, section 5.2, with the
    hyper-parameters and state-dict names of the authors' release. Query, key and value are
    projected once, on a map that is padded and shifted already. The attention path works in
    windows cut from them; the convolution path, on the whole map, passes over their borders. Its
    ``fc`` has a bias.

    As in the release, the output projection belongs to the attention path alone, the rates come
    after it, and the attention path's channel is ``head * d + position``, the convolution path's
    ``position * N + head``.

    Args:
        attention (nn.Module): The plain operator, mmdet's ``WindowMSA`` of Swin or a module with
            its attributes, whose parts this one takes over: with plain weights, rate1 = 1 and
            rate2 = 0 the two are equal.
        kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        mix (str): See :class:`~acmix_mm.layers.MixedOperator`. Default: 'learned'.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`. Default: None.
        shift (str): See :class:`~acmix_mm.layers.MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): See :class:`~acmix_mm.layers.MixedOperator`. Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        attention: nn.Module,
        kernel_size: int = 3,
        mix: str = 'learned',
        backend: str | None = None,
        *,
        shift: str = 'learned',
        kernel_groups: int | None = None,
    ):
        super().__init__(
            attention,
            kernel_size,
            fc_bias=True,
            mix=mix,
            backend=backend,
            shift=shift,
            kernel_groups=kernel_groups,
        )
        self.window_size = attention.window_size
        self.qkv = attention.qkv
        if self.with_attention:  # DistributedDataParallel refuses parameters without gradient
            self.scale_factor = attention.scale
            self.attn_drop_rate = attention.attn_drop.p
            self.proj = attention.proj
            self.proj_drop = attention.proj_drop
            self.relative_position_bias_table = attention.relative_position_bias_table
            self.register_buffer('relative_position_index', attention.relative_position_index)

    @property
    def output_projection(self) -> nn.Linear:
        return self.proj

    def forward(self, x: Tensor, mask: Tensor | None = None, unshift: int = 0) -> Tensor:
        """Attention within windows, convolution across them.

        Args:
            x (Tensor): Shape (B, H, W, C), H and W multiples of the window's.
            mask (Tensor | None): Shape (windows, Wh * Ww, Wh * Ww), added to the logits of each
                window of an image, from left to right, then downwards. Default: None.
            unshift (int): How far the map has been rolled to the left and upwards, where the
                convolution path is to see it as it was; the result is then rolled back.
                Default: 0.

        Returns:
            Tensor: Shape (B, H, W, C).
        """
        maps = self.project(x, self.qkv.weight, self.qkv.bias)
        attention = self._attend(maps, mask) if self.with_attention else None
        if unshift:
            maps = maps.roll((unshift, unshift), (-2, -1))
            if attention is not None:
                attention = attention.roll((unshift, unshift), (1, 2))
        return self.mix_paths(maps, attention)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, window_size={self.window_size}'

    def _attend(self, maps: Tensor, mask: Tensor | None) -> Tensor:
        """(B, d, 3, N, H, W) -> (B, H, W, C), before the output projection."""
        bias = self.position_bias().to(maps.dtype)
        mask = None if mask is None else mask.to(maps.dtype)
        drop_rate = self.attn_drop_rate if self.training else 0.0
        differentiated = torch.is_grad_enabled() and (maps.requires_grad or bias.requires_grad)
        if (
            differentiated
            and maps.device.type == 'cpu'
            and len(maps)
            and not drop_rate
            and not transformed()
            and not torch.compiler.is_compiling()
        ):
            return _WindowAttention.apply(maps, bias, mask, self.window_size, self.scale_factor)
        return _window_attention(maps, bias, mask, self.window_size, self.scale_factor, drop_rate)

    def position_bias(self) -> Tensor:
        """What is added to the logits within a window, (N, Wh * Ww, Wh * Ww)."""
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.unflatten(0, self.relative_position_index.shape).permute(2, 0, 1)


def _window_attention(
    maps: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    window_size: Sequence[int],
    scale: float,
    drop_rate: float = 0.0,
) -> Tensor:
    """(B, d, 3, N, H, W) -> (B, H, W, N * d).

    Logits of all windows get the bias (N, Wh * Ww, Wh * Ww), those of a window of an image its
    mask (windows, Wh * Ww, Wh * Ww).
    """
    bias = _masked(bias, mask)
    # Apart from each other, so that none is kept in memory for another's sake.
    query, key, value = (_cut(part, window_size, len(bias)) for part in maps.unbind(2))
    if len(maps):
        out = F.scaled_dot_product_attention(query, key, value, bias[None], drop_rate, scale=scale)
    else:  # there it leaves out gradients
        out = query + key + value + bias.sum()
    return _join(out, maps, window_size)


class _WindowAttention(torch.autograd.Function):
    """:func:`_window_attention` that keeps the maps, which the convolution path keeps as well.

    PyTorch keeps query, key and value of all windows besides, 3 C numbers a pixel; here they are
    cut from the maps once more. For its own gradients to be differentiated, it is taken anew.
    """

    @staticmethod
    def forward(
        ctx,
        maps: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        window_size: Sequence[int],
        scale: float,
    ) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            out, weights = _explicitly(maps, bias, mask, window_size, scale)
        ctx.save_for_backward(maps, bias, mask, weights)
        ctx.arguments = (window_size, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, bias, mask, weights = ctx.saved_tensors
        window_size, scale = ctx.arguments
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:2]
            inputs = [t for t, need in zip((maps, bias), needed, strict=True) if need]
            out, _ = _explicitly(maps, bias, mask, window_size, scale)
            gradients = torch.autograd.grad(out, inputs, grad, create_graph=True)
            return *spread(gradients, needed), None, None, None
        heads = weights.size(1)
        with torch.autocast(maps.device.type, enabled=False):
            query, key, value = (_cut(part, window_size, heads) for part in maps.unbind(2))
            grad = grad.unflatten(3, (maps.size(3), -1)).permute(0, 4, 3, 1, 2)
            grad = _cut(grad.to(maps.dtype), window_size, heads)
            grad_logits = torch._softmax_backward_data(grad @ value.mT, weights, -1, weights.dtype)
            grad_bias = grad_logits.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
            grad_bias = grad_bias.view(-1, *bias.shape).sum(0).to(bias.dtype)
            grad_logits *= scale
            grad_maps = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
            parts = (grad_logits @ key, grad_logits.mT @ query, weights.mT @ grad)
            for whole, windows in zip(grad_maps.unbind(2), parts, strict=True):
                target = _windows(whole, window_size)
                target.copy_(windows.view(target.shape))
        return grad_maps, grad_bias, None, None, None


def _explicitly(
    maps: Tensor, bias: Tensor, mask: Tensor | None, window_size: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Result of :func:`_window_attention`, and the weights (outer, heads, L, L)."""
    added = _masked(bias, mask)
    query, key, value = (_cut(part, window_size, len(added)) for part in maps.unbind(2))
    weights = torch.add(added, query @ key.mT, alpha=scale).softmax(-1)
    return _join(weights @ value, maps, window_size), weights


def _masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to logits: (N, L, L), or of all windows of an image (windows * N, L, L)."""
    # Windows of an image differ in their masks, so they count as its heads.
    return bias if mask is None else (bias + mask[:, None]).flatten(0, 1)


def _windows(part: Tensor, window_size: Sequence[int]) -> Tensor:
    """(B, d, N, H, W) as (B, windows down, windows across, N, rows, columns, d), a view."""
    rows, cols = window_size
    grid = (part.size(3) // rows, part.size(4) // cols)
    windows = part.unflatten(4, (grid[1], cols)).unflatten(3, (grid[0], rows))
    return windows.permute(0, 3, 5, 2, 4, 6, 1)


def _cut(part: Tensor, window_size: Sequence[int], heads: int) -> Tensor:
    """(B, d, N, H, W) -> (B * windows * N / heads, heads, rows * columns, d), a copy."""
    windows = _windows(part, window_size)
    outer = windows.shape[:4].numel() // heads
    return windows.reshape(outer, heads, windows.shape[4:6].numel(), part.size(1))


def _join(windows: Tensor, maps: Tensor, window_size: Sequence[int]) -> Tensor:
    """Inverse of :func:`_cut`, for maps (B, d, 3, N, H, W): (B, H, W, N * d)."""
    batch, head_dim, _, heads, height, width = maps.shape
    rows, cols = window_size
    windows = windows.reshape(batch, height // rows, width // cols, heads, rows, cols, head_dim)
    return windows.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads * head_dim)
