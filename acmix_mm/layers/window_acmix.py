"""ACmix with window attention, the operator of Swin-ACmix."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._autograd import spread, takes_own_formulas
from .mixed_operator import ProjectedMixedOperator, gradient_to_add_to

QUERY, KEY, VALUE = range(3)  # the parts of maps


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
        attention = None
        if self.with_attention:
            attention, maps = self._attend(maps, mask)
        if moves(unshift):
            maps = maps.roll((unshift, unshift), (-2, -1))
            if attention is not None:
                attention = attention.roll((unshift, unshift), (1, 2))
        return self.mix_paths(maps, attention)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, window_size={self.window_size}'

    def _attend(self, maps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, d, 3, N, H, W) -> (B, H, W, C), before the output projection; and the maps."""
        bias = self.position_bias().to(maps.dtype)
        dropout = self.attn_drop_rate if self.training else 0.0
        arguments = (maps, bias, mask, self.window_size, self.scale_factor)
        # On a CPU, PyTorch has no fused kernel for a bias with gradients.
        if takes_own_formulas(maps) and not dropout:
            return _WindowAttention.apply(*arguments)
        return _window_attention(*arguments, dropout), maps

    def position_bias(self) -> Tensor:
        """What is added to the logits within a window, (N, Wh * Ww, Wh * Ww)."""
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.t().contiguous().unflatten(1, self.relative_position_index.shape)


def moves(shift: int | torch.SymInt) -> bool:
    """Whether a cyclic shift has something to do; a symbol of torch.export may have."""
    return not isinstance(shift, int) or shift != 0


def _windows(maps: Tensor, window_size: tuple[int, int]) -> Tensor:
    """View of (B, d, 3, N, H, W): (3, B, windows down, across, N, d, rows, columns)."""
    rows, cols = window_size
    windows = maps.unflatten(5, (maps.size(5) // cols, cols))
    windows = windows.unflatten(4, (maps.size(4) // rows, rows))
    return windows.permute(2, 0, 4, 6, 3, 1, 5, 7)


def _image(out: Tensor, maps: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Results of all windows, in the order of :func:`_windows`, each (L, d), as (B, H, W, C)."""
    batch, head_dim, _, heads, height, width = maps.shape
    rows, cols = window_size
    out = out.reshape(batch, height // rows, width // cols, heads, rows, cols, head_dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, height, width, heads * head_dim)


def _with_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Windows of an image differ in their masks, so they count as its heads."""
    return bias if mask is None else (bias + mask[:, None].to(bias.dtype)).flatten(0, 1)


def _window_attention(
    maps: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    window_size: tuple[int, int],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within windows, of projected maps.

    Args:
        maps (Tensor): Shape (B, d, 3, N, H, W).
        bias (Tensor): Added to the logits, shape (N, L, L).
        mask (Tensor | None): Also added, shape (windows of an image, L, L).
        window_size (tuple[int, int]): Rows and columns of a window, of L pixels.
        scale (float): Of the logits.
        dropout (float): Of the attention weights. Default: 0.0.

    Returns:
        Tensor: Shape (B, H, W, C).
    """
    windows = _windows(maps, window_size)
    bias = _with_mask(bias, mask)
    inner, pixels, _ = bias.shape
    # Not numel() of the shape, which makes an integer of sizes that torch.export leaves open.
    outer = math.prod(windows.shape[1:5]) // inner
    # Apart from each other, so that none is kept in memory for another's sake.
    query, key, value = (
        part.movedim(4, -1).reshape(outer, inner, pixels, maps.size(1)) for part in windows
    )
    if outer:
        out = F.scaled_dot_product_attention(query, key, value, bias[None], dropout, scale=scale)
    else:  # there it leaves out gradients
        out = query + key + value + bias.sum()
    return _image(out, maps, window_size)


class _WindowAttention(torch.autograd.Function):
    """:func:`_window_attention`, which saves no windows: they are cut from the maps anew.

    The maps are kept for the convolution path anyway, and returned for it: so its gradient of them
    comes here, where that of the windows is added. Sums are float32 for half precision.
    """

    @staticmethod
    def forward(ctx, maps, bias, mask, window_size, scale):
        with torch.autocast('cpu', enabled=False):
            out, weights = _compose(maps, bias, mask, window_size, scale)
        ctx.save_for_backward(maps, bias, mask, weights)
        ctx.set_materialize_grads(False)
        ctx.arguments = (window_size, scale)
        return out, maps

    @staticmethod
    def backward(ctx, grad, grad_maps):
        if grad is None:
            return grad_maps, None, None, None, None
        maps, bias, mask, weights = ctx.saved_tensors
        window_size, scale = ctx.arguments
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # to be differentiated again: as a composition of operators
            inputs = [t for t, need in zip((maps, bias), needed, strict=True) if need]
            out, _ = _compose(maps, bias, mask, window_size, scale)
            gradients = torch.autograd.grad(out, inputs, grad, create_graph=True)
            of_maps, of_bias = spread(gradients, needed)
            if grad_maps is not None and of_maps is not None:
                of_maps = of_maps + grad_maps
            return of_maps, of_bias, None, None, None
        rows, cols = window_size
        grid = (maps.size(4) // rows, rows, maps.size(5) // cols, cols)
        heads = grad.unflatten(3, (maps.size(3), -1)).unflatten(2, grid[2:])
        heads = heads.unflatten(1, grid[:2]).permute(0, 1, 3, 5, 2, 4, 6)
        grad = heads.reshape(len(weights), rows * cols, -1).to(weights.dtype)
        with torch.autocast('cpu', enabled=False):
            of_weights = torch.bmm(grad, _cut(maps, VALUE, window_size).mT)
            of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            del of_weights
            of_bias = of_maps = None
            if needed[1]:
                of_bias = of_logits.view(-1, *bias.shape).sum(0).to(bias.dtype)
            if needed[0]:
                of_logits.mul_(scale)
                of_maps = gradient_to_add_to(maps, grad_maps)
                targets = _windows(of_maps, window_size)

                def add(part: int, gradient: Tensor) -> None:
                    targets[part].add_(gradient.view(targets.shape[1:]))

                # One after the other, as each needs memory of a map or two.
                add(VALUE, torch.bmm(grad.mT, weights))
                add(QUERY, torch.bmm(_cut(maps, KEY, window_size).mT, of_logits.mT))
                add(KEY, torch.bmm(_cut(maps, QUERY, window_size).mT, of_logits))
        return of_maps, of_bias, None, None, None


def _compose(
    maps: Tensor, bias: Tensor, mask: Tensor | None, window_size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """As :func:`_window_attention`, of products and softmax; also the weights (windows, L, L)."""
    query, key, value = (_cut(maps, part, window_size) for part in (QUERY, KEY, VALUE))
    logits = torch.bmm(query, key.mT)
    added = _with_mask(bias, mask).to(logits.dtype)
    logits = torch.add(added, logits.view(-1, *added.shape), alpha=scale)
    weights = logits.softmax(-1).flatten(0, 1)
    out = torch.bmm(weights, value).to(maps.dtype)
    return _image(out, maps, window_size), weights


def _cut(maps: Tensor, part: int, window_size: tuple[int, int]) -> Tensor:
    """Query, key or value of all windows and heads, (windows, L, d), at least float32."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    windows = _windows(maps, window_size)[part].movedim(4, -1)
    return windows.reshape(-1, window_size[0] * window_size[1], maps.size(1)).to(dtype)
