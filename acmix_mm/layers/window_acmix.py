"""ACmix with window attention, the operator of Swin-ACmix."""

import torch.nn.functional as F
from torch import Tensor, nn

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
        batch, head_dim, _, heads, height, width = maps.shape
        rows, cols = self.window_size
        grid = (height // rows, width // cols)
        windows = maps.unflatten(5, (grid[1], cols)).unflatten(4, (grid[0], rows))
        bias = self.position_bias().to(maps.dtype)
        if mask is None:
            outer, inner = batch * grid[0] * grid[1], heads
        else:
            # Windows of an image differ in their masks, so they count as its heads.
            outer, inner = batch, grid[0] * grid[1] * heads
            bias = (bias + mask[:, None].to(bias.dtype)).flatten(0, 1)
        # (B, d, N, windows down, rows, across, columns) each; apart from each other, so that none
        # is kept in memory for another's sake.
        query, key, value = (
            part.permute(0, 3, 5, 2, 4, 6, 1).reshape(outer, inner, rows * cols, head_dim)
            for part in windows.unbind(2)
        )
        if batch:
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                bias[None],
                self.attn_drop_rate if self.training else 0.0,
                scale=self.scale_factor,
            )
        else:  # there it leaves out gradients
            out = query + key + value + bias.sum()
        out = out.reshape(batch, *grid, heads, rows, cols, head_dim)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, self.embed_dims)

    def position_bias(self) -> Tensor:
        """What is added to the logits within a window, (N, Wh * Ww, Wh * Ww)."""
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.unflatten(0, self.relative_position_index.shape).permute(2, 0, 1)
