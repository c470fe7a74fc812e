"""ACmix with spatial-reduction attention, the operator of PVT-ACmix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._autograd import spread, takes_own_formulas
from .mixed_operator import ProjectedMixedOperator, gradient_to_add_to, planes


class SpatialReductionACmix(ProjectedMixedOperator):
    """Mix of spatial-reduction attention and convolution over shared projections.

    "On the Integration of Self-Attention and Convolution", CVPR 2022, section 5.2. The paper does
    not say how key and value meet the spatial reduction; no code was published. Our reading: the
    attention path is PVT's as it stands, with key and value of the reduced map, and the convolution
    path takes query, key and value of the full map, projected by the same weights. Where nothing is
    reduced they are projected once for both. There is no position encoding, ``fc`` has no bias,
    and, as in Swin-ACmix, the rates come after the output projection, which belongs to the
    attention path alone.

    Args:
        attention (nn.Module): The plain operator, mmdet's ``SpatialReductionAttention`` of PVT or
            a module with its attributes, whose parts this one takes over: with plain weights,
            rate1 = 1 and rate2 = 0 the two are equal, on maps that the plain one takes.
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
            mix=mix,
            backend=backend,
            shift=shift,
            kernel_groups=kernel_groups,
        )
        self.attn = attention.attn  # its forward is not used: it averages weights nobody reads
        self.dropout_layer = attention.dropout_layer
        self.sr_ratio = attention.sr_ratio
        if self.with_attention:
            self.proj_drop = attention.proj_drop
            if self.sr_ratio > 1:
                self.sr, self.norm = attention.sr, attention.norm
        else:  # DistributedDataParallel refuses parameters without gradient
            del self.attn.out_proj

    @property
    def output_projection(self) -> nn.Linear:
        return self.attn.out_proj

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None
    ) -> Tensor:
        """The mixed operator and the shortcut around it.

        Args:
            x (Tensor): Shape (B, H * W, C).
            hw_shape (tuple[int, int]): H and W, at least ``sr_ratio``.
            identity (Tensor | None): Shape (B, H * W, C), what the result is added to; None is x.
                Default: None.

        Returns:
            Tensor: Shape (B, H * W, C).
        """
        identity = x if identity is None else identity
        image = x.unflatten(1, hw_shape)
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        reduced = self.with_attention and self.sr_ratio > 1
        queries = slice(0, self.embed_dims if reduced and not self.with_convolution else None)
        maps = self.project(image, weight[queries], None if bias is None else bias[queries])
        attention = None
        if self.with_attention:
            keys = self.reduced(image) if reduced else None
            dropout = self.attn.dropout if self.training else 0.0
            attention, maps = _attend(maps, keys, dropout)
        out = self.mix_paths(maps, attention).flatten(1, 2)
        return identity + self.dropout_layer(out)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, sr_ratio={self.sr_ratio}'

    def reduced(self, image: Tensor) -> Tensor:
        """Keys and values of the reduced map, (B, H, W, C) -> (2, B, N, tokens, d)."""
        tokens = self.norm(self.sr(image.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        rest = slice(self.embed_dims, None)
        keys = F.linear(tokens, weight[rest], None if bias is None else bias[rest])
        return keys.unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)


def _attend(maps: Tensor, keys: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention by PyTorch's fused kernel.

    Args:
        maps (Tensor): Shape (B, d, parts, N, H, W): query, key and value, or the query alone.
        keys (Tensor | None): Key and value where not those of the maps, (2, B, N, tokens, d).
        dropout (float): Of the attention weights.

    Returns:
        tuple[Tensor, Tensor]: The result, (B, H, W, C), and the maps.
    """
    if takes_own_formulas(maps) and not dropout:
        return _FusedAttention.apply(maps, keys)
    # Of planes, PyTorch would take the composition of products and softmax.
    tensors = (t.contiguous() for t in _tokens(maps, keys))
    return _image(F.scaled_dot_product_attention(*tensors, dropout_p=dropout), maps), maps


def _tokens(maps: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of maps, views (B, N, tokens, d)."""
    tokens = maps.flatten(4).permute(2, 0, 3, 4, 1)
    return (tokens[0], *(tokens[1:] if keys is None else keys))


def _image(out: Tensor, maps: Tensor) -> Tensor:
    """(B, N, H * W, d) -> (B, H, W, C)."""
    return out.transpose(1, 2).flatten(2).unflatten(1, maps.shape[4:])


class _FusedAttention(torch.autograd.Function):
    """PyTorch's fused kernel for CPUs, which may be differentiated any number of times here.

    No copy of the query is saved, as the maps are kept anyway: for the convolution path, for which
    they are returned. So its gradient of them comes here, where that of the query is added.
    """

    @staticmethod
    def forward(ctx, maps, keys):
        tensors = [t.contiguous() for t in _tokens(maps, keys)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors)
        ctx.save_for_backward(maps, keys, out, lse)
        ctx.set_materialize_grads(False)
        return _image(out, maps), maps

    @staticmethod
    def backward(ctx, grad, grad_maps):
        if grad is None:
            return grad_maps, None
        maps, keys, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again: as a composition of operators
            query, key, value = _tokens(maps, keys)
            logits = query @ key.transpose(-1, -2) * query.size(-1) ** -0.5
            chosen = [t for t, need in zip((maps, keys), needed, strict=True) if need]
            result = _image(logits.softmax(-1) @ value, maps)
            of_maps, of_keys = spread(
                torch.autograd.grad(result, chosen, grad, create_graph=True), needed
            )
            if grad_maps is not None and of_maps is not None:
                of_maps = of_maps + grad_maps
            return of_maps, of_keys
        grad = grad.flatten(1, 2).unflatten(2, (maps.size(3), -1)).transpose(1, 2)
        tensors = [t.contiguous() for t in _tokens(maps, keys)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *tensors, out, lse, 0.0, False
        )
        of_maps = of_keys = None
        if needed[1]:
            of_keys = torch.stack(gradients[1:])
        if needed[0]:
            of_maps = gradient_to_add_to(maps, grad_maps)
            for part, gradient in enumerate(gradients if keys is None else gradients[:1]):
                of_part = planes(gradient.transpose(1, 2).flatten(2))  # (B, N * d, H * W)
                of_part = of_part.view(len(maps), maps.size(3), -1, *maps.shape[4:])
                of_maps[:, :, part].add_(of_part.transpose(1, 2))
        return of_maps, of_keys
