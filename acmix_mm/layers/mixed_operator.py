"""What all operators that mix attention and convolution share."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..ops._autograd import takes_own_formulas
from ..ops._checks import check_positive
from ..ops._dispatch import autocast_tensors, check_backend
from ..ops._products import addmm_, bmm, linear, mm
from .deployable import Deployable
from .mixing_weights import TENSORS, MixingWeights, folding_pays, shift_kernel

MIX_MODES = ('learned', 'complementary', 'sum', 'attention', 'conv')
SHIFTS = ('learned', 'random', 'fixed', 'tensor')


class MixedOperator(Deployable):
    """Convolution path and combination of the two paths (ACmix, CVPR 2022, section 4).

    The output is ``rate1 * attention + rate2 * convolution``. Subclasses project the input to
    query, key and value, compute the attention path, and combine the two by
    :meth:`mixing_weights`. For inference, :meth:`switch_to_deploy` folds what can be folded;
    subclasses give it the weights of their projection by :meth:`projection_weights`.

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
        shift (str): How the convolution path shifts and sums maps (sections 4.2 and 4.3, ablation
            of the shift): by a grouped convolution with kernels that are learned, from those that
            shift and sum ('learned') or from random ones ('random'), or that stay as they are,
            without parameters ('fixed'); or by shifts of tensors ('tensor'), which give the same
            as 'fixed', more slowly. 'random' draws normal kernels by Kaiming's rule (fan-out,
            ReLU): the authors' release of ResNet-ACmix (``ResNet/ResNet_ImageNet.py``) initialises
            all convolutions so after the operator has set its shift kernels, and overwrites them.
            Default: 'learned'.
        kernel_groups (int | None): How many kernels the outputs of each head position have
            (section 4.3: several groups of convolution kernels), a divisor of their number, which
            is C / d; adjacent outputs share one. With 1, all outputs of a position are equal. None
            is one for each output where kernels are learned, and 1 where they are constant, as
            more would all be the same. Default: None.

    Where kernels are constant, a buffer ``shift_kernel`` takes the place of ``dep_conv``. A state
    dict with one of the two is refused by an operator with the other, also where loading is not
    strict and would leave kernels out in silence.

    Attributes:
        kernel_groups (int): As the argument, resolved.
        folds (bool): Whether training, too, multiplies ``fc`` into the kernels: where that takes
            fewer multiplications. Never with ``shift='tensor'``.
    """

    deployed_names = ('fc_bias', 'kernel', 'scale')

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
        *,
        shift: str = 'learned',
        kernel_groups: int | None = None,
    ):
        super().__init__()
        check_positive('kernel_size', kernel_size, odd=True)
        if mix not in MIX_MODES:
            raise ValueError(f'mix must be one of {MIX_MODES}, got {mix!r}')
        if shift not in SHIFTS:
            raise ValueError(f'shift must be one of {SHIFTS}, got {shift!r}')
        check_backend(backend)
        self.mix = mix
        self.shift = shift
        self.backend = backend
        self.head_dim = head_dim
        self.kernel_groups = self._resolve_kernel_groups(kernel_groups, out_channels // head_dim)
        self._geometry = {
            'groups': head_dim, 'stride': stride, 'dilation': dilation, 'channels': out_channels,
        }  # fmt: skip
        num_kernels = head_dim * self.kernel_groups
        self.folds = shift != 'tensor' and folding_pays(
            num_maps, num_kernels, head_dim, kernel_size, stride
        )
        if self.with_convolution:
            positions = kernel_size**2
            fc = torch.empty(positions, num_maps, 1, 1)
            nn.init.kaiming_uniform_(fc, a=5**0.5)  # nn.Conv2d's own initialisation
            self.fc = nn.ParameterDict({'weight': fc})
            if fc_bias:
                bound = num_maps**-0.5
                self.fc['bias'] = torch.empty(positions).uniform_(-bound, bound)
            if self.learns_kernels:
                kernel = shift_kernel(num_kernels, head_dim, kernel_size)
                if shift == 'random':
                    nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
                self.dep_conv = nn.ParameterDict({'weight': kernel})
            else:
                self.register_buffer('shift_kernel', shift_kernel(1, 1, kernel_size))
            self.register_load_state_dict_pre_hook(_check_kernels)
        if mix in ('learned', 'complementary'):
            self.rate1 = nn.Parameter(torch.full((1,), 0.5))
        if mix == 'learned':
            self.rate2 = nn.Parameter(torch.full((1,), 0.5))
        self.register_parameter('bias', nn.Parameter(torch.zeros(out_channels)) if bias else None)

    def _resolve_kernel_groups(self, kernel_groups: int | None, outputs: int) -> int:
        if kernel_groups is None:
            return outputs if self.learns_kernels else 1
        check_positive('kernel_groups', kernel_groups)
        if not self.learns_kernels and kernel_groups != 1:
            raise ValueError(
                f'kernel_groups must be None or 1 with shift {self.shift!r}, whose kernels are all '
                f'the same, got {kernel_groups}'
            )
        if outputs % kernel_groups:
            raise ValueError(
                f'kernel_groups must be a divisor of the {outputs} outputs of a head position, '
                f'got {kernel_groups}'
            )
        return kernel_groups

    @property
    def learns_kernels(self) -> bool:
        """Whether the convolution path's kernels are parameters, else they are constant."""
        return self.shift in ('learned', 'random')

    @property
    def with_attention(self) -> bool:
        return self.mix != 'conv'

    @property
    def with_convolution(self) -> bool:
        return self.mix != 'attention'

    def mixing_weights(self) -> MixingWeights:
        """Weights of Stage II, with what can be multiplied beforehand."""
        if self.deployed:
            return MixingWeights(
                **{name: getattr(self, name) for name in TENSORS}, **self._geometry
            )
        rate1, rate2 = getattr(self, 'rate1', None), getattr(self, 'rate2', None)
        if self.mix == 'complementary':
            rate2 = 1 - rate1
        elif self.mix == 'sum':
            rate1 = self.fc['weight'].new_ones(1)
        options = {'scale': rate1, 'bias': self.bias, **self._geometry}
        if not self.with_convolution:
            return MixingWeights(None, **options)
        fc, fc_bias = self.fc['weight'].flatten(1), self.fc.get('bias')
        if self.learns_kernels:
            kernel = self.dep_conv['weight']
        else:
            kernel = self.shift_kernel.repeat(self.head_dim, 1, 1, 1)
        weights = MixingWeights(
            kernel, fc, fc_bias, tensor_shifts=self.shift == 'tensor', **options
        )
        if rate2 is not None:
            weights = weights.times(rate2)
        return weights.folded() if self.folds else weights

    def projection_weights(self) -> dict[str, Tensor | None]:
        """What takes the place of a subclass's parameter dicts in the form for inference."""
        return {}

    def fold(self, norm: nn.Module | None) -> None:
        weights = {**self.projection_weights(), **self._stage2_weights(norm).tensors()}
        folded = [n for n, m in self.named_children() if isinstance(m, nn.ParameterDict)]
        folded += [name for name in ('rate1', 'rate2', 'shift_kernel') if hasattr(self, name)]
        for name in folded:
            delattr(self, name)
        for name, weight in weights.items():
            if weight is not None:
                weight = nn.Parameter(weight.detach().clone())
            self.register_parameter(name, weight)
        self.register_load_state_dict_pre_hook(_make_room_for_norm)

    def _inference_weights(self) -> MixingWeights:
        """As :meth:`mixing_weights`; of shifts of tensors, the convolution that equals them."""
        weights = self.mixing_weights()
        return weights.folded() if weights.tensor_shifts else weights

    def _stage2_weights(self, norm: nn.Module | None) -> MixingWeights:
        """Weights of the form for inference, where the attention path always has a scale."""
        weights = self._inference_weights()
        if self.with_attention and weights.scale is None:
            weights = replace(weights, scale=next(self.parameters()).new_ones(1))
        return weights if norm is None else weights.followed_by(norm)

    def extra_repr(self) -> str:
        return (
            f'mix={self.mix!r}, shift={self.shift!r}, kernel_groups={self.kernel_groups}, '
            f'backend={self.backend!r}, deployed={self.deployed}'
        )


def _check_kernels(module: MixedOperator, state_dict: dict, prefix: str, *args) -> None:
    """Refuse a state dict with learned kernels where they are constant, and the reverse."""
    name = f'{prefix}shift_kernel' if module.learns_kernels else f'{prefix}dep_conv.weight'
    if name not in state_dict or module.deployed:
        return
    if module.learns_kernels:
        found, allowed = 'constant', "'fixed' or 'tensor'"
    else:
        found, allowed = 'learned', "'learned' or 'random'"
    raise ValueError(
        f'state dict has {found} kernels, with {name!r}, and the operator shift={module.shift!r}: '
        f'load it into one with shift {allowed}'
    )


def _make_room_for_norm(module: MixedOperator, state_dict: dict, prefix: str, *args) -> None:
    """Load operators with a folded norm, which has values for each output, into ones without."""
    outputs = module._geometry['channels']
    for name in ('kernel', 'fc_bias', 'scale', 'bias'):
        own, given = getattr(module, name), state_dict.get(prefix + name)
        if given is None or given.ndim == 0 or len(given) != outputs:
            continue
        fits = name == 'bias' if own is None else own.shape[1:] == given.shape[1:]
        if fits and (own is None or own.shape != given.shape):
            room = next(module.parameters()).new_empty(given.shape)
            setattr(module, name, nn.Parameter(room, requires_grad=False))


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
        shift (str): See :class:`MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): See :class:`MixedOperator`. Default: None.

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
        *,
        shift: str = 'learned',
        kernel_groups: int | None = None,
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
            shift=shift,
            kernel_groups=kernel_groups,
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
        tokens, weight, bias = autocast_tensors(x.flatten(1, 2), weight, bias)
        order = (len(weight) // self.embed_dims, self.num_heads, self.head_dim)
        project = _Projection.apply if takes_own_formulas(tokens) else _project
        maps = project(tokens, weight, bias, order)
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
        weights = self.mixing_weights()
        if attention is None:
            return weights.convolve(maps.flatten(2, 3), self.backend).permute(0, 2, 3, 1)
        weight, bias = self.output_projection.weight, self.output_projection.bias
        scale = weights.scale
        bias = None if bias is None else _scaled(bias, scale)
        drops = self.training and self.proj_drop.p > 0
        if weights.kernel is not None and not drops and takes_own_formulas(attention):
            convolution = replace(weights, bias=bias).convolve(maps.flatten(2, 3), self.backend)
            return _Sum.apply(convolution, attention, weight, scale)
        attention = self.proj_drop(linear(attention, _scaled(weight, scale), bias))
        if weights.kernel is None:
            return attention
        return attention + weights.convolve(maps.flatten(2, 3), self.backend).permute(0, 2, 3, 1)

    def _stage2_weights(self, norm: nn.Module | None) -> MixingWeights:
        if norm is not None:
            raise ValueError('norm must be None for an operator with an output projection')
        weights = self._inference_weights()
        if weights.scale is not None:
            projection = self.output_projection
            for parameter in projection.parameters():
                parameter.mul_(weights.scale.view(-1, *(1,) * (parameter.ndim - 1)))
        return replace(weights, scale=None)

    def extra_repr(self) -> str:
        return f'{self.embed_dims}, num_heads={self.num_heads}, {super().extra_repr()}'


def planes(tokens: Tensor) -> Tensor:
    """(B, pixels, C) -> (B, C, pixels), contiguous."""
    out = tokens.new_empty(tokens.size(0), *tokens.shape[:0:-1])
    for index, sample in enumerate(tokens):  # PyTorch transposes a matrix in blocks, a batch not
        out[index].copy_(sample.t())
    return out


def gradient_to_add_to(maps: Tensor, grad: Tensor | None) -> Tensor:
    """The convolution path's gradient of the maps, which nothing else holds; zeros without it."""
    if grad is None:
        return torch.zeros_like(maps, memory_format=torch.contiguous_format)
    return grad.contiguous()


def _project(tokens: Tensor, weight: Tensor, bias: Tensor | None, order: tuple) -> Tensor:
    """(B, pixels, C) -> (B, d * parts * N, pixels) by weights (parts * N * d, C)."""
    # Permuting weights costs nothing, permuting maps a pass over memory.
    weight = _by_position(weight, order).expand(tokens.size(0), -1, -1)
    bias = None if bias is None else _by_position(bias, order)[:, None]
    return bmm(weight, tokens.transpose(1, 2), bias)


def _by_position(weight: Tensor, order: tuple) -> Tensor:
    """Rows of (part, head, head position) -> (head position, part, head)."""
    return weight.unflatten(0, order).movedim(2, 0).flatten(0, 2)


class _Projection(torch.autograd.Function):
    """:func:`_project`, which saves no permuted weights and gives tokens their gradient as tokens.

    PyTorch's own formula gives planes, which are transposed slowly by what takes them next.
    """

    @staticmethod
    def forward(ctx, tokens, weight, bias, order):
        ctx.save_for_backward(tokens, weight)
        ctx.order = order
        return _project(tokens, weight, bias, order)

    @staticmethod
    def backward(ctx, grad):
        tokens, weight = ctx.saved_tensors
        part, head, position = ctx.order

        def by_part(gradient: Tensor) -> Tensor:
            return gradient.unflatten(0, (position, part, head)).movedim(0, 2).flatten(0, 2)

        of_tokens = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = _by_position(weight, ctx.order).expand(len(grad), -1, -1)
            of_tokens = bmm(grad.transpose(1, 2), weight)
        if ctx.needs_input_grad[1]:
            of_weight = by_part(bmm(grad, tokens).sum(0))
        if ctx.needs_input_grad[2]:
            of_bias = by_part(grad.sum((0, 2)))
        return of_tokens, of_weight, of_bias, None


class _Sum(torch.autograd.Function):
    """The convolution path, (B, C, H, W), plus the projection of the attention's result.

    The product is added to what it is summed with, and neither scaled weights nor another map are
    saved. Results and gradients have the layout in which what takes them is fastest.
    """

    @staticmethod
    def forward(ctx, convolution, attention, weight, scale):
        ctx.save_for_backward(attention, weight, scale)
        out = convolution.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        weight = _scaled(weight, scale).to(out.dtype)
        addmm_(out.flatten(0, 2), attention.flatten(0, 2), weight.t())
        return out

    @staticmethod
    def backward(ctx, grad):
        attention, weight, scale = ctx.saved_tensors
        tokens = grad.flatten(0, 2)
        of_convolution = of_attention = of_weight = of_scale = None
        if ctx.needs_input_grad[0]:
            of_convolution = planes(grad.flatten(1, 2)).unflatten(2, grad.shape[1:3])
        if ctx.needs_input_grad[1]:
            of_attention = mm(tokens, _scaled(weight, scale).to(grad.dtype)).view_as(attention)
        if any(ctx.needs_input_grad[2:]):
            of_weight = mm(tokens.t(), attention.flatten(0, 2)).to(weight.dtype)
            if ctx.needs_input_grad[3]:
                of_scale = (of_weight * weight).sum().view(1)
            of_weight = _scaled(of_weight, scale)
        return of_convolution, of_attention, of_weight, of_scale


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale
