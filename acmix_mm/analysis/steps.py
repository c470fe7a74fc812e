"""A step of work to be measured: a function, the tensors that get gradients, the case it is for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Unavailable(Exception):
    """Why there is nothing to measure on this machine; no failure."""


@dataclass(frozen=True)
class Case:
    """What a candidate runs on; ``shape`` is the input's, (height, width) for detectors."""

    shape: tuple[int, ...]
    train: bool
    dtype: str = 'float32'
    device: str = 'cpu'
    cast: bool = False  # a whole model's weights and images, instead of autocast

    @property
    def mode(self) -> str:
        return 'train' if self.train else 'forward'

    @property
    def precision(self) -> str:
        return f'{self.dtype} (cast)' if self.cast else self.dtype


@dataclass
class Step:
    """A candidate ready to run: call it for a step, :meth:`reset` it between steps."""

    run: Callable[[], object]
    small: Callable[[], object]  # the same on a very small input, which loads what steps need
    leaves: list[Tensor]  # what gets gradients
    weights: int = 0  # bytes of parameters and buffers

    def __call__(self) -> None:
        self.run()

    def reset(self) -> None:
        for tensor in self.leaves:
            tensor.grad = None


def random_maps(number: int, case: Case, shape: tuple[int, ...] | None = None) -> list[Tensor]:
    """Normal maps in dtype and on the device of the case, the same for every candidate."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape or case.shape, generator=generator) for _ in range(number)]
    return [m.to(case.device, DTYPES[case.dtype]) for m in maps]


def tensor_step(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    grad: Tensor,
    case: Case,
    layer: nn.Module | None = None,
    crops: bool = True,
) -> Step:
    """A step of a function of tensors; training sends ``grad`` back to inputs and parameters.

    ``crops`` tells whether the function takes maps of any size, else a small step is a whole one.
    """

    def run(inputs: list[Tensor], grad: Tensor) -> None:
        if case.train:
            function(*inputs).backward(grad)
        else:
            with torch.no_grad():
                function(*inputs)

    def whole() -> None:
        run(inputs, grad)

    def small() -> None:
        *maps, end = (m.detach()[..., :8, :8].contiguous() for m in (*inputs, grad))
        run([m.requires_grad_(case.train) for m in maps], end)

    leaves = [] if layer is None else list(layer.parameters())
    leaves += [x.requires_grad_(case.train) for x in inputs]
    weights = 0 if layer is None else weight_bytes(layer)
    return Step(whole, small if crops else whole, leaves, weights)


def model_step(model: nn.Module, data: dict, small: dict, case: Case) -> Step:
    """A detector's or segmenter's prediction, or its loss and gradients, for collated samples."""

    def run(data: dict) -> None:
        # A copy, for what the preprocessor and two-stage detectors do to samples.
        data = {**data, 'data_samples': [sample.clone() for sample in data['data_samples']]}
        data = model.data_preprocessor(data, case.train)
        if case.train:
            with autocast(case):
                loss, _ = model.parse_losses(model(**data, mode='loss'))
            loss.backward()
        else:
            with torch.no_grad(), autocast(case):
                model(**data, mode='predict')

    leaves = list(model.parameters())
    return Step(lambda: run(data), lambda: run(small), leaves, weight_bytes(model))


def autocast(case: Case) -> torch.autocast:
    dtype = DTYPES[case.dtype]
    device_type = torch.device(case.device).type
    enabled = dtype != torch.float32 and not case.cast
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
