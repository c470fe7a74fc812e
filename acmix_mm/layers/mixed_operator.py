"""What all operators that mix attention and convolution share."""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import (
    bias_map,
    check_backend,
    check_positive,
    fold_shift_conv,
    folding_pays,
    group_conv,
    shift_conv,
    shift_kernel,
)

MIX_MODES = ('learned', 'complementary', 'sum', 'attention', 'conv')


def batch_norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and shift, (C,) each, that a batch norm multiplies and adds in evaluation mode.

    Raises:
        ValueError: If norm is no batch norm with running statistics.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        raise ValueError(
            f'norm must be a batch norm with running statistics, got {type(norm).__name__}'
        )
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor
    return factor, shift if norm.bias is None else shift + norm.bias


class MixedOperator(BaseModule):
    """Convolution path and combination of the two paths (ACmix, CVPR 2022, section 4).

    The output is ``rate1 * attention + rate2 * convolution``. Subclasses project the input to
    query, key and value, compute the attention path, and call :meth:`mix_paths`. For inference,
    :meth:`switch_to_deploy` folds what can be folded; subclasses give it the weights of their
    projection by :meth:`projection_weights`.

    Parameters are held outside ``nn.Conv2d`` modules on purpose: the generic initialisation of the
    model around the operator, which matches layers by class name, would overwrite the shift
    initialisation of ``dep_conv`` otherwise. State-dict names are the published ones.

    Args:
        out_channels (int): Output channels C, a multiple of ``head_dim``.
        num_maps (int): Maps that the convolution path mixes: 3 N for N heads.
        head_dim (int): Channels of a head, d.
        kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        stride (int): Stride of the convolution path. Default: 1.
        dilation (int): Dilation of the convolution path. Default: 1.
        bias (bool): Adds a learned bias to the output. Default: False.
        fc_bias (bool): Adds one to the maps that ``fc`` mixes. Default: False.
        mix (str): How the paths are combined (section 5.4, ablation of the combination):
            'learned' (rate1 and rate2 are free parameters, 0.5 at the start), 'complementary'
            (rate1 is, rate2 = 1 - rate1), 'sum' (both are 1), or one path only: 'attention',
            'conv'. Default: 'learned'.
        backend (str | None): Of the operators, see :func:`acmix_mm.ops.local_attention`.
            Default: None.
    """

    def __init__(
        self,
        out_channels: int,
        num_maps: int,
        head_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        fc_bias: bool = False,
        mix: str = 'learned',
        backend: str | None = None,
    ):
        super().__init__()
        check_positive('kernel_size', kernel_size, odd=True)
        if mix not in MIX_MODES:
            raise ValueError(f'mix must be one of {MIX_MODES}, got {mix!r}')
        check_backend(backend)
        self.mix = mix
        self.backend = backend
        self.head_dim = head_dim
        self.deployed = False
        self._geometry = (stride, dilation)
        self._folds = folding_pays(num_maps, out_channels, head_dim, kernel_size, stride)
        if self.with_convolution:
            positions = kernel_size**2
            fc = torch.empty(positions, num_maps, 1, 1)
            nn.init.kaiming_uniform_(fc, a=5**0.5)  # nn.Conv2d's own initialisation
            self.fc = nn.ParameterDict({'weight': fc})
            if fc_bias:
                bound = num_maps**-0.5
                self.fc['bias'] = torch.empty(positions).uniform_(-bound, bound)
            self.dep_conv = nn.ParameterDict(
                {'weight': shift_kernel(out_channels, head_dim, kernel_size)}
            )
        if mix in ('learned', 'complementary'):
            self.rate1 = nn.Parameter(torch.full((1,), 0.5))
        if mix == 'learned':
            self.rate2 = nn.Parameter(torch.full((1,), 0.5))
        self.register_parameter('bias', nn.Parameter(torch.zeros(out_channels)) if bias else None)

    @property
    def with_attention(self) -> bool:
        return self.mix != 'conv'

    @property
    def with_convolution(self) -> bool:
        return self.mix != 'attention'

    def mixing_weights(self) -> tuple[Tensor | None, ...]:
        """Weights of Stage II, with what can be multiplied beforehand.

        Returns:
            tuple[Tensor | None, ...]: ``fc`` (k * k, M) and its bias (k * k,), or None and the
            bias's kernel (C, 1, k, k) where it is folded into the next; kernel (C, M or k * k, k,
            k) of the grouped convolution; scale (1,) or (C,) of the attention path. What belongs
            to a path that is not there is None, and so is the bias that ``fc`` does not have.
        """
        if self.deployed:
            return self.fc, self.fc_bias, self.kernel, self.scale
        scale = fc = fc_bias = kernel = None
        if self.with_attention:
            scale = getattr(self, 'rate1', None)
            if scale is None:
                scale = next(self.parameters()).new_ones(1)
        if self.with_convolution:
            # A bias is one more column, for a map of ones.
            fc, kernel = self.fc['weight'].flatten(1), self.dep_conv['weight']
            if 'bias' in self.fc:
                fc = torch.cat([fc, self.fc['bias'][:, None]], 1)
            # The path is linear, so its rate goes into the smallest of its factors.
            if self.mix == 'learned':
                fc = fc * self.rate2
            elif self.mix == 'complementary':
                fc = fc * (1 - self.rate1)
            if 'bias' in self.fc:
                fc, fc_bias = fc[:, :-1], fc[:, -1]
            if self._folds:
                if fc_bias is not None:
                    fc_bias = fold_shift_conv(fc_bias[:, None], kernel, self.head_dim)
                fc, kernel = None, fold_shift_conv(fc, kernel, self.head_dim)
        return fc, fc_bias, kernel, scale

    def projection_weights(self) -> dict[str, Tensor | None]:
        """What takes the place of a subclass's parameter dicts in the form for inference."""
        return {}

    def mix_paths(self, maps: Tensor, attention: Tensor | None) -> Tensor:
        """Output from the projected maps and the attention path's result.

        Args:
            maps (Tensor): Shape (B, d, M, H, W).
            attention (Tensor | None): Shape (B, C, ceil(H / stride), ceil(W / stride)); None where
                there is only the convolution path.

        Returns:
            Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)).
        """
        fc, fc_bias, kernel, scale = self.mixing_weights()
        if scale is not None:
            scale = scale.to(attention.dtype).view(-1, 1, 1)
        if kernel is None:
            out = attention * scale if self.deployed else attention  # undeployed it is 1
            return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)
        convolution = self.convolve(maps, fc, fc_bias, kernel)
        return convolution if scale is None else torch.addcmul(convolution, attention, scale)

    def convolve(
        self, maps: Tensor, fc: Tensor | None, fc_bias: Tensor | None, kernel: Tensor
    ) -> Tensor:
        """The convolution path, (B, C, ceil(H / stride), ceil(W / stride)), and the output's bias.

        Args:
            maps (Tensor): Shape (B, d, M, H, W).
            fc (Tensor | None): The first three of :meth:`mixing_weights`.
            fc_bias (Tensor | None): See above.
            kernel (Tensor): See above.
        """
        options = {'bias': self.bias, 'backend': self.backend}
        if fc is not None:
            return shift_conv(maps, fc, kernel, *self._geometry, **options, fc_bias=fc_bias)
        out = group_conv(maps, kernel, *self._geometry, **options)
        if fc_bias is None:
            return out
        return out + bias_map(fc_bias, maps.shape[3:], *self._geometry).to(out.dtype)

    @torch.no_grad()
    def switch_to_deploy(self, norm: nn.Module | None = None) -> None:
        """Fold everything that can be, for inference, in place; a second call does nothing.

        ``fc`` goes into the grouped convolution where that has no more multiplications, rates and
        a batch norm that follows the operator into weights, scale and bias. Results stay within
        rounding. The state dict's names change, so load checkpoints before (or deployed ones
        after).

        Args:
            norm (nn.Module | None): A batch norm that is applied to the output, to be folded; the
                caller takes it out of the model. Default: None.

        Raises:
            ValueError: If norm is no batch norm with running statistics, or the operator is
                deployed already, so that norm cannot be folded.
        """
        if norm is not None and self.deployed:
            raise ValueError('norm must be None for an operator that is deployed already')
        if self.deployed:
            return
        weights = {**self.projection_weights(), **self._stage2_weights(norm)}
        folded = [n for n, m in self.named_children() if isinstance(m, nn.ParameterDict)]
        for name in [*folded, *(n for n in ('rate1', 'rate2') if n in self._parameters)]:
            delattr(self, name)
        for name, weight in weights.items():
            if weight is not None:
                weight = nn.Parameter(weight.detach().clone())
            self.register_parameter(name, weight)
        self.requires_grad_(False)
        self.deployed = True

    def _stage2_weights(self, norm: nn.Module | None) -> dict[str, Tensor | None]:
        fc, fc_bias, kernel, scale = self.mixing_weights()
        bias = self.bias
        if norm is not None:
            factor, shift = batch_norm_affine(norm)
            bias = shift if bias is None else bias * factor + shift
            kernel = None if kernel is None else kernel * factor.view(-1, 1, 1, 1)
            if fc is None and fc_bias is not None:
                fc_bias = fc_bias * factor.view(-1, 1, 1, 1)
            scale = None if scale is None else scale * factor
        return {'fc': fc, 'fc_bias': fc_bias, 'kernel': kernel, 'scale': scale, 'bias': bias}


class ProjectedMixedOperator(MixedOperator):
    """Mixed operator of a vision transformer: its attention path ends in a linear projection.

    The rates come after the projection, so that the attention path's goes into its weights. Maps
    come in and go out channel-last. Subclasses set ``proj_drop``, the dropout that follows the
    projection, where there is an attention path.

    Args:
        attention (nn.Module): The plain operator, with ``embed_dims`` and ``num_heads``. Subclasses
            take its parts over, so that parameters have the names and initial values that they
            have there.
        kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        fc_bias (bool): See :class:`MixedOperator`. Default: False.
        mix (str): See :class:`MixedOperator`. Default: 'learned'.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`. Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        attention: nn.Module,
        kernel_size: int = 3,
        fc_bias: bool = False,
        mix: str = 'learned',
        backend: str | None = None,
    ):
        embed_dims, num_heads = attention.embed_dims, attention.num_heads
        if embed_dims % num_heads:
            raise ValueError(
                f'embed_dims must be divisible by num_heads ({num_heads}), got {embed_dims}'
            )
        super().__init__(
            embed_dims,
            num_maps=3 * num_heads,
            head_dim=embed_dims // num_heads,
            kernel_size=kernel_size,
            fc_bias=fc_bias,
            mix=mix,
            backend=backend,
        )
        self.embed_dims = embed_dims
        self.num_heads = num_heads

    @property
    def output_projection(self) -> nn.Linear:
        """The projection at the end of the attention path."""
        raise NotImplementedError

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Project a channel-last map to maps of planes, as the convolution path wants them.

        Args:
            x (Tensor): Shape (B, H, W, C).
            weight (Tensor): Shape (parts * C, C), ordered as (part, head, head position); the
                parts are query, key and value, or the first of them.
            bias (Tensor | None): Shape (parts * C,).

        Returns:
            Tensor: Shape (B, d, parts, N, H, W).
        """
        # Permuting weights costs nothing, permuting maps a pass over memory.
        order = (-1, self.num_heads, self.head_dim)
        weight = weight.unflatten(0, order).permute(2, 0, 1, 3).flatten(0, 2)
        weight = weight.expand(x.size(0), -1, -1)
        tokens = x.flatten(1, 2).transpose(1, 2)
        if bias is None:
            maps = torch.bmm(weight, tokens)
        else:
            bias = bias.view(order).permute(2, 0, 1).reshape(-1, 1)
            maps = torch.baddbmm(bias, weight, tokens)
        maps = maps.unflatten(1, (self.head_dim, -1, self.num_heads))
        return maps.unflatten(-1, x.shape[1:3])

    def mix_paths(self, maps: Tensor | None, attention: Tensor | None) -> Tensor:
        """Output from the projected maps and the attention's result before its projection.

        Args:
            maps (Tensor | None): Shape (B, d, 3, N, H, W); not used where there is only attention.
            attention (Tensor | None): Shape (B, H, W, C); None where there is only the convolution
                path.

        Returns:
            Tensor: Shape (B, H, W, C).
        """
        fc, fc_bias, kernel, scale = self.mixing_weights()
        if attention is not None:
            weight, bias = self.output_projection.weight, self.output_projection.bias
            if scale is not None:
                weight = weight * scale[:, None]
                bias = None if bias is None else bias * scale
            attention = self.proj_drop(F.linear(attention, weight, bias))
        if kernel is None:
            return attention
        convolution = self.convolve(maps.flatten(2, 3), fc, fc_bias, kernel).permute(0, 2, 3, 1)
        return convolution if attention is None else attention + convolution

    def _stage2_weights(self, norm: nn.Module | None) -> dict[str, Tensor | None]:
        if norm is not None:
            raise ValueError('norm must be None for an operator with an output projection')
        weights = super()._stage2_weights(norm)
        if weights['scale'] is not None:
            projection = self.output_projection
            for parameter in projection.parameters():
                parameter.mul_(weights['scale'].view(-1, *(1,) * (parameter.ndim - 1)))
        return {**weights, 'scale': None}
