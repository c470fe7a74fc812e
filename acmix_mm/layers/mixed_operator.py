"""What all operators that mix attention and convolution share."""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import (
    check_backend,
    check_positive,
    fold_shift_conv,
    folding_pays,
    group_conv,
    shift_conv,
    shift_kernel,
)

MIX_MODES = ('learned', 'complementary', 'sum', 'attention', 'conv')


class MixedOperator(BaseModule):
    """Convolution path and combination of the two paths (ACmix, CVPR 2022, section 4).

    The output is ``rate1 * attention + rate2 * convolution``. Subclasses project the input to
    query, key and value, compute the attention path, and call :meth:`mix_paths`. For inference,
    :meth:`switch_to_deploy` folds what can be folded; subclasses give it the weights of their
    projection by ``projection_weights``.

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

    def mixing_weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weights of Stage II, with what can be multiplied beforehand.

        Returns:
            tuple[Tensor | None, Tensor | None, Tensor | None]: ``fc`` (k * k, M), or None where it
            is folded into the next; kernel (C, M or k * k, k, k) of the grouped convolution; scale
            (1,) or (C,) of the attention path. What belongs to a path that is not there is None.
        """
        if self.deployed:
            return self.fc, self.kernel, self.scale
        scale = fc = kernel = None
        if self.with_attention:
            scale = getattr(self, 'rate1', None)
            if scale is None:
                scale = next(self.parameters()).new_ones(1)
        if self.with_convolution:
            fc, kernel = self.fc['weight'].flatten(1), self.dep_conv['weight']
            # The path is linear, so its rate goes into the smallest of its factors.
            if self.mix == 'learned':
                fc = fc * self.rate2
            elif self.mix == 'complementary':
                fc = fc * (1 - self.rate1)
            if self._folds:
                fc, kernel = None, fold_shift_conv(fc, kernel, self.head_dim)
        return fc, kernel, scale

    def mix_paths(self, maps: Tensor, attention: Tensor | None) -> Tensor:
        """Output from the projected maps and the attention path's result.

        Args:
            maps (Tensor): Shape (B, d, M, H, W).
            attention (Tensor | None): Shape (B, C, ceil(H / stride), ceil(W / stride)); None where
                there is only the convolution path.

        Returns:
            Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)).
        """
        fc, kernel, scale = self.mixing_weights()
        if scale is not None:
            scale = scale.to(attention.dtype).view(-1, 1, 1)
        if kernel is None:
            out = attention * scale if self.deployed else attention  # undeployed it is 1
            return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)
        options = {'bias': self.bias, 'backend': self.backend}
        if fc is None:
            convolution = group_conv(maps, kernel, *self._geometry, **options)
        else:
            convolution = shift_conv(maps, fc, kernel, *self._geometry, **options)
        return convolution if scale is None else torch.addcmul(convolution, attention, scale)

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
        if norm is not None:
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
                raise ValueError(
                    'norm must be None or a batch norm with running statistics, got '
                    f'{type(norm).__name__}'
                )
            if self.deployed:
                raise ValueError('norm must be None for an operator that is deployed already')
        if self.deployed:
            return
        weights = {**self.projection_weights(), **self._stage2_weights(norm)}
        for name in [*dict(self.named_children()), *self._parameters]:
            delattr(self, name)
        for name, weight in weights.items():
            if weight is not None:
                weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            self.register_parameter(name, weight)
        self.deployed = True

    def _stage2_weights(self, norm: nn.Module | None) -> dict[str, Tensor | None]:
        fc, kernel, scale = self.mixing_weights()
        bias = self.bias
        if norm is not None:
            factor = (norm.running_var + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight
            shift = -norm.running_mean if bias is None else bias - norm.running_mean
            bias = shift * factor if norm.bias is None else shift * factor + norm.bias
            kernel = None if kernel is None else kernel * factor.view(-1, 1, 1, 1)
            scale = None if scale is None else scale * factor
        return {'fc': fc, 'kernel': kernel, 'scale': scale, 'bias': bias}
