"""What mixed operators look at: attention weights, and what each path adds, on an image.

Weights are those by which an operator sums values in its attention path, computed from the inputs
that it has had in a run of the model: :func:`attentions_of`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ACmix, MixedOperator, PatchACmix, SpatialReductionACmix, WindowACmix
from ..layers.mixing_weights import shift_kernel
from ..layers.patch_attention import patchwise_weights, project
from ..layers.path_rates import check_not_deployed, mixed_operators
from ..ops._reflection import reflect
from ..ops.fused_acmix import position_encoding
from .path_bias import path_terms, run_hooked

CHUNK_BYTES = 2**26  # of neighbourhoods unfolded into memory


@dataclass(frozen=True)
class Call:
    """How an operator was called, for the first image of a batch.

    Args:
        arguments (dict): Of its forward, by name.
        shift (int): By how many pixels its map had been rolled to the left and upwards.
        size (tuple[int, int] | None): Height and width of the map before that and before padding,
            where whoever calls the operator does these; None is the operator's own.
    """

    arguments: dict
    shift: int = 0
    size: tuple[int, int] | None = None


class Attention(ABC):
    """Attention weights of one mixed operator on one image.

    Positions are (row, column) of the map to which the operator is applied.

    Args:
        name (str): Of the operator in its model.
        operator (MixedOperator): In evaluation mode, with an attention path.
        call (Call): How it was called.

    Attributes:
        size (tuple[int, int]): Height and width of that map.
        query_size (tuple[int, int]): Of the map of queries, smaller with a stride.
        stride (int): Positions from one query to the next.
        groups (int): How many weights there are for a query and a key: heads, or groups of
            channels.
        grid (tuple[int, int]): How the keys of a query are arranged, rows and columns.
        key_size (int): Side, in positions, of the square that a key stands for.
    """

    signed: ClassVar = False  # whether weights may be negative; otherwise they sum to 1
    group_name: ClassVar = 'head'

    size: tuple[int, int]
    groups: int
    grid: tuple[int, int]
    stride = 1
    key_size = 1

    def __init__(self, name: str, operator: MixedOperator, call: Call):
        self.name = name
        self.operator = operator
        self.call = call

    @property
    def query_size(self) -> tuple[int, int]:
        height, width = self.size
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def kind(self) -> str:
        """The operator's class, and what its keys are."""
        return f'{type(self.operator).__name__}, {self.neighbourhood}'

    @property
    @abstractmethod
    def neighbourhood(self) -> str:
        """What the keys of a query are, in words."""

    @abstractmethod
    def keys(self, queries: Tensor) -> Tensor:
        """Which keys the queries look at.

        Args:
            queries (Tensor): Integers (P, 2), positions of the map of queries.

        Returns:
            Tensor: Integers (P, K, 2), the first positions (row, column) that each key stands for.
            Those outside the map are its padding.
        """

    @abstractmethod
    def own(self, queries: Tensor) -> Tensor:
        """Which of the keys stands for the position of the query itself, integers (P,)."""

    def beyond(self, queries: Tensor) -> Tensor:
        """Which of the keys are beyond the border: reflected ones, or padding; bool (P, K)."""
        keys = self.keys(queries)
        return (keys >= keys.new_tensor(self.size)).any(-1)

    @property
    @abstractmethod
    def geometry(self) -> dict:
        """What :meth:`keys` depends on, for the page of :mod:`.attention_page`."""

    @abstractmethod
    def _weights(self, queries: Tensor) -> Tensor:
        """(P, 2) -> (P, groups, K)."""

    @torch.no_grad()
    def weights(self, queries: Tensor) -> Tensor:
        """Attention weights of queries.

        Args:
            queries (Tensor): Integers (P, 2), positions of the map of queries.

        Returns:
            Tensor: Shape (P, groups, K), keys in the order of :meth:`keys`.
        """
        channels = self.operator.head_dim * self.groups
        bytes_each = channels * self.grid[0] * self.grid[1] * 8
        queries = queries.to(next(self.operator.parameters()).device)
        chunks = queries.split(max(1, CHUNK_BYTES // bytes_each))
        return torch.cat([self._weights(chunk) for chunk in chunks])

    def on_map(self, queries: Tensor) -> Tensor:
        """Weights laid out on the map; where keys are the same position, their sum.

        Args:
            queries (Tensor): Integers (P, 2), positions of the map of queries.

        Returns:
            Tensor: Shape (P, groups, rows, columns), one value for a square of ``key_size``. What
            falls on padding of the map is left out.
        """
        rows, cols = (-(-side // self.key_size) for side in self.size)
        keys = self.keys(queries) // self.key_size
        inside = (keys < keys.new_tensor([rows, cols])).all(-1)
        index = (keys[..., 0] * cols + keys[..., 1]) * inside
        weights = self.weights(queries).to(keys.device) * inside[:, None]
        out = weights.new_zeros(*weights.shape[:2], rows * cols)
        out.scatter_add_(2, index[:, None].expand_as(weights), weights)
        return out.unflatten(2, (rows, cols))

    def path_terms(self) -> tuple[Tensor, Tensor]:
        """What the two paths add up, see :func:`~acmix_mm.analysis.path_bias.path_terms`.

        Returns:
            tuple[Tensor, Tensor]: Maps (C, rows, columns) of ``query_size``.
        """
        terms = path_terms(self.operator, **self.call.arguments)
        return tuple(self._as_map(term[0]) for term in terms)

    def _as_map(self, term: Tensor) -> Tensor:
        """The operator's output for an image as (C, rows, columns)."""
        return term


class Neighbourhood(Attention):
    """Keys in a square around the query, reflected at the border."""

    kernel_size: int
    dilation = 1

    @property
    def neighbourhood(self) -> str:
        side = self.kernel_size
        parts = [f'{side}x{side} neighbourhood']
        parts += [
            f'{name} {value}'
            for name, value in (('stride', self.stride), ('dilation', self.dilation))
            if value > 1
        ]
        return ', '.join(parts)

    @property
    def grid(self) -> tuple[int, int]:
        return self.kernel_size, self.kernel_size

    @property
    def geometry(self) -> dict:
        return {'type': 'neighbourhood', 'stride': self.stride, 'dilation': self.dilation}

    def _taps(self, queries: Tensor) -> Tensor:
        """As :meth:`keys`, before reflection."""
        radius = self.kernel_size // 2
        taps = torch.arange(-radius, radius + 1, device=queries.device) * self.dilation
        offsets = torch.stack(torch.meshgrid(taps, taps, indexing='ij'), -1).flatten(0, 1)
        return queries[:, None] * self.stride + offsets

    def keys(self, queries: Tensor) -> Tensor:
        rows, cols = self._taps(queries).unbind(-1)
        return torch.stack([reflect(rows, self.size[0]), reflect(cols, self.size[1])], -1)

    def own(self, queries: Tensor) -> Tensor:
        return torch.full_like(queries[:, 0], self.kernel_size**2 // 2)

    def beyond(self, queries: Tensor) -> Tensor:
        return (self._taps(queries) != self.keys(queries)).any(-1)


class ACmixAttention(Neighbourhood):
    """Of :class:`~acmix_mm.layers.ACmix`: a softmax with the position encoding."""

    @torch.no_grad()
    def __init__(self, name: str, operator: ACmix, call: Call):
        super().__init__(name, operator, call)
        x = call.arguments['x']
        weight, bias, slopes = operator.projection_weights().values()
        maps = F.conv2d(x, weight, bias)[0].unflatten(0, (operator.head_dim, 3, -1))
        self.query, key, _ = maps.permute(1, 2, 0, 3, 4)  # (N, d, H, W) each
        self.key = key - position_encoding(slopes, key[None])
        self.groups = operator.num_heads
        self.size = tuple(x.shape[-2:])
        self.kernel_size = operator.attn_kernel_size
        self.stride, self.dilation = operator.stride[0], operator.dilation[0]

    def _weights(self, queries: Tensor) -> Tensor:
        rows, cols = (queries * self.stride).unbind(-1)
        query = self.query[:, :, rows, cols]
        rows, cols = self.keys(queries).unbind(-1)
        logits = torch.einsum('ndp,ndpk->pnk', query, self.key[:, :, rows, cols])
        return (logits * self.operator.head_dim**-0.5).softmax(-1)


class PatchwiseAttention(Neighbourhood):
    """Of :class:`~acmix_mm.layers.PatchACmix`: weights of either sign, by a small network."""

    signed = True
    group_name = 'group'

    @torch.no_grad()
    def __init__(self, name: str, operator: PatchACmix, call: Call):
        super().__init__(name, operator, call)
        x, norm = call.arguments['x'], call.arguments.get('norm')
        projections = (operator.conv1, operator.conv2)
        query, key = project(x, projections, norm).chunk(2, 1)
        side = self.kernel_size = operator.attn_kernel_size
        weights = patchwise_weights(operator.conv_w, query, key, side, operator.backend)
        self.all_weights = weights[0].unflatten(0, (-1, side**2))
        self.groups = self.all_weights.size(0)
        self.size = tuple(x.shape[-2:])

    def _weights(self, queries: Tensor) -> Tensor:
        rows, cols = queries.unbind(-1)
        return self.all_weights[:, :, rows, cols].permute(2, 0, 1)


class ReducedAttention(Attention):
    """Of :class:`~acmix_mm.layers.SpatialReductionACmix`: all positions of a reduced map."""

    @torch.no_grad()
    def __init__(self, name: str, operator: SpatialReductionACmix, call: Call):
        super().__init__(name, operator, call)
        self.size = call.arguments['hw_shape']
        image = call.arguments['x'].unflatten(1, self.size)
        self.key_size = operator.sr_ratio
        weight, bias = operator.attn.in_proj_weight, operator.attn.in_proj_bias
        maps = operator.project(image, weight, bias)[0].permute(1, 2, 3, 4, 0)  # (3, N, H, W, d)
        self.query = maps[0]
        if self.key_size > 1:
            self.key = operator.reduced(image)[0, 0]
        else:
            self.key = maps[1].flatten(1, 2)
        self.groups = operator.num_heads
        self.grid = tuple(side // self.key_size for side in self.size)

    @property
    def neighbourhood(self) -> str:
        rows, cols = self.grid
        if self.key_size == 1:
            return f'all {rows}x{cols} positions'
        side = self.key_size
        return f'all positions of the map reduced to {rows}x{cols} ({side}x{side} each)'

    def keys(self, queries: Tensor) -> Tensor:
        rows, cols = (torch.arange(n, device=queries.device) * self.key_size for n in self.grid)
        keys = torch.stack(torch.meshgrid(rows, cols, indexing='ij'), -1).flatten(0, 1)
        return keys.expand(len(queries), -1, -1)

    def own(self, queries: Tensor) -> Tensor:
        rows, cols = queries.unbind(-1)
        row, col = (
            (places // self.key_size).clamp(max=side - 1)
            for places, side in zip((rows, cols), self.grid, strict=True)
        )
        return row * self.grid[1] + col

    @property
    def geometry(self) -> dict:
        return {'type': 'grid'}

    def _weights(self, queries: Tensor) -> Tensor:
        rows, cols = queries.unbind(-1)
        logits = torch.einsum('npd,nkd->pnk', self.query[:, rows, cols], self.key)
        return (logits * self.operator.head_dim**-0.5).softmax(-1)

    def _as_map(self, term: Tensor) -> Tensor:
        return term.unflatten(0, self.size).permute(2, 0, 1)


class WindowAttention(Attention):
    """Of :class:`~acmix_mm.layers.WindowACmix`: the window in which the query is.

    Windows are cut from a map that may have been padded and rolled. Where the block around the
    operator does that, as in ACmixSwinTransformer, positions are those of the map as it was before:
    a window may have positions from both sides of the map, which the mask keeps apart.
    """

    @torch.no_grad()
    def __init__(self, name: str, operator: WindowACmix, call: Call):
        super().__init__(name, operator, call)
        x, self.mask = call.arguments['x'], call.arguments.get('mask')
        maps = operator.project(x, operator.qkv.weight, operator.qkv.bias)[0]
        self.query, self.key, _ = maps.permute(1, 2, 3, 4, 0)  # (N, H, W, d) each
        self.bias = operator.position_bias()
        self.padded = tuple(x.shape[1:3])
        self.size = call.size or self.padded
        self.groups = operator.num_heads
        self.grid = tuple(operator.window_size)

    @property
    def neighbourhood(self) -> str:
        rows, cols = self.grid
        shifted = f', shifted by {self.call.shift}' if self.call.shift else ''
        return f'windows of {rows}x{cols}{shifted}'

    def _rolled(self, queries: Tensor) -> Tensor:
        return (queries - self.call.shift) % queries.new_tensor(self.padded)

    def _rolled_keys(self, rolled: Tensor) -> Tensor:
        rows, cols = (torch.arange(n, device=rolled.device) for n in self.grid)
        inside = torch.stack(torch.meshgrid(rows, cols, indexing='ij'), -1).flatten(0, 1)
        window = rolled.new_tensor(self.grid)
        return (rolled // window * window)[:, None] + inside

    def keys(self, queries: Tensor) -> Tensor:
        keys = self._rolled_keys(self._rolled(queries))
        return (keys + self.call.shift) % keys.new_tensor(self.padded)

    def own(self, queries: Tensor) -> Tensor:
        rows, cols = self._rolled(queries).unbind(-1)
        return rows % self.grid[0] * self.grid[1] + cols % self.grid[1]

    @property
    def geometry(self) -> dict:
        return {'type': 'window', 'shift': self.call.shift, 'padded': self.padded}

    def _weights(self, queries: Tensor) -> Tensor:
        rolled = self._rolled(queries)
        rows, cols = rolled.unbind(-1)
        query = self.query[:, rows, cols]
        key_rows, key_cols = self._rolled_keys(rolled).unbind(-1)
        logits = torch.einsum('npd,npkd->pnk', query, self.key[:, key_rows, key_cols])
        logits = logits * self.operator.scale_factor
        inside = self.own(queries)
        logits = logits + self.bias[:, inside].transpose(0, 1)
        if self.mask is not None:
            across = self.padded[1] // self.grid[1]
            window = rows // self.grid[0] * across + cols // self.grid[1]
            logits = logits + self.mask[window, inside][:, None]
        return logits.softmax(-1)

    def _as_map(self, term: Tensor) -> Tensor:
        if not self.call.arguments.get('unshift'):
            term = term.roll((self.call.shift,) * 2, (0, 1))
        height, width = self.size
        return term[:height, :width].permute(2, 0, 1)


KINDS: dict[type[MixedOperator], type[Attention]] = {
    ACmix: ACmixAttention,
    PatchACmix: PatchwiseAttention,
    SpatialReductionACmix: ReducedAttention,
    WindowACmix: WindowAttention,
}


def attentions_of(
    model: nn.Module, run: Callable[[], object], names: Iterable[str] | None = None
) -> list[Attention]:
    """Attention weights of the mixed operators of a model in a run of it.

    Args:
        model (nn.Module): In evaluation mode, not deployed.
        run (Callable[[], object]): Calls the model on an image, for example ``lambda:
            model(image)``. Of a batch, the first image counts, of several calls of an operator the
            first.
        names (Iterable[str] | None): Of the operators. Default: None, for all that have an
            attention path and are called.

    Returns:
        list[Attention]: In the order of the model.

    Raises:
        ValueError: If there is no such operator, or if one that is named has no attention path or
            is not called; if the model is deployed or in training mode.
    """
    operators = attending_operators(model)
    if names is not None:
        names = list(names)
        check_names(names, operators)
        operators = {name: operators[name] for name in operators if name in names}
    calls = _calls_of(model, run, operators)
    missing = [name for name in operators if name not in calls]
    if names is not None and missing:
        raise ValueError(f'run must call {missing[0]}, and does not')
    if not calls:
        raise ValueError('run must call the model, none of its mixed operators was called')
    for name, call in calls.items():
        if not call.arguments['x'].isfinite().all():
            raise ValueError(f'run must have finite values, the input of {name} has others')
    return [
        next(KINDS[kind] for kind in type(operators[name]).__mro__ if kind in KINDS)(
            name, operators[name], calls[name]
        )
        for name in operators
        if name in calls
    ]


def attending_operators(model: nn.Module) -> dict[str, MixedOperator]:
    """Mixed operators with an attention path, by their names.

    Raises:
        ValueError: If there is none, or if one is deployed or in training mode.
    """
    operators = mixed_operators(model)
    for name, operator in operators.items():
        check_not_deployed(name, operator)
        if operator.training:
            raise ValueError('model must be in evaluation mode, got one in training mode')
    operators = {
        name: operator
        for name, operator in operators.items()
        if operator.with_attention and isinstance(operator, tuple(KINDS))
    }
    if not operators:
        raise ValueError("model must have operators with an attention path, all have mix='conv'")
    return operators


def check_names(names: Iterable[str], operators: Iterable[str]) -> None:
    """Raises a ValueError unless all names are names of operators; it says which there are."""
    operators = list(operators)
    for name in names:
        if name not in operators:
            raise ValueError(
                f'layers must be of {", ".join(operators)} (mixed operators with attention), got '
                f'{name}'
            )


def _calls_of(
    model: nn.Module, run: Callable[[], object], operators: dict[str, MixedOperator]
) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    around: dict[MixedOperator, tuple[int, tuple[int, int]]] = {}  # shift and size
    handles = []
    for name, operator in operators.items():

        def keep(operator, args, kwargs, name=name) -> None:
            if name not in calls:
                arguments = inspect.signature(operator.forward).bind(*args, **kwargs).arguments
                for maps in ('x', 'identity'):  # of the first image
                    if isinstance(arguments.get(maps), Tensor):
                        arguments[maps] = arguments[maps][:1].clone()
                calls[name] = Call(arguments, *around.get(operator, ()))

        handles.append(operator.register_forward_pre_hook(keep, with_kwargs=True))
    for module in model.modules():  # blocks of ACmixSwinTransformer
        if hasattr(module, 'shift_of') and getattr(module, 'w_msa', None) in operators.values():

            def keep_shift(module, args, kwargs) -> None:
                hw_shape = (*args, *kwargs.values())[1]
                around[module.w_msa] = (module.shift_of(hw_shape), tuple(hw_shape))

            handles.append(module.register_forward_pre_hook(keep_shift, with_kwargs=True))
    run_hooked(run, handles)
    return calls


# Convolution path.


@dataclass(frozen=True)
class ShiftKernels:
    """The kernels with which an operator's convolution path shifts and sums.

    Args:
        initial (Tensor): The shift kernel with which training starts by default, (k * k, k, k), see
            :func:`~acmix_mm.layers.mixing_weights.shift_kernel`.
        mean (Tensor): Of the learned kernels, over outputs, (k * k, k, k).
        change (Tensor): Root mean square over outputs of learned less initial, (k * k, k, k).
        relative_change (float): Norm of learned less initial, divided by that of initial.
        folded (Tensor): Root mean square over outputs of the kernels with ``fc`` and rate2 in them,
            for each map that they take, (rows, columns, k, k).
        row_names (tuple[str, ...]): What the rows of those maps are: query, key and value.
        column_names (tuple[str, ...]): What the columns are: heads.
    """

    initial: Tensor
    mean: Tensor
    change: Tensor
    relative_change: float
    folded: Tensor
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]


@torch.no_grad()
def shift_kernels(operator: MixedOperator) -> ShiftKernels | None:
    """The learned shift kernels of an operator; None where there are none to be learned.

    Raises:
        ValueError: If the operator is deployed, as kernels are folded then.
    """
    check_not_deployed('operator', operator)
    if not operator.with_convolution or not hasattr(operator, 'dep_conv'):
        return None
    kernel = operator.dep_conv['weight']
    initial = shift_kernel(1, 1, kernel.size(-1)).to(kernel)[0]
    change = (kernel - initial).square().mean(0).sqrt()
    folded = operator.mixing_weights().folded().kernel.square().mean(0).sqrt()
    relative = (change.norm() / initial.norm()).item()
    if isinstance(operator, PatchACmix):
        names = (('',), ('q', 'k', *(f'v{i + 1}' for i in range(len(folded) - 2))))
    else:
        names = (('q', 'k', 'v'), tuple(str(i + 1) for i in range(len(folded) // 3)))
    folded = folded.unflatten(0, tuple(map(len, names)))
    return ShiftKernels(initial, kernel.mean(0), change, relative, folded, *names)


def default_names(attentions: Sequence[Attention]) -> list[str]:
    """The last operator of each stage, that is, for each size of maps that come out."""
    return list({a.query_size: a.name for a in attentions}.values())
