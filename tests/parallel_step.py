"""A training step of models in two processes, as tools/train.py wraps them; started by torchrun.

argv[1] holds a list of models, each with the batches of both processes: images, or all arguments of
a detector's or segmentor's forward. Both processes' outputs, averaged gradients and buffers go to
argv[2]. A second step fails if a parameter had no part in the first.
"""

import copy
import sys

import torch
from processes import save_both_and_leave
from torch import Tensor, distributed, nn

from acmix_mm.engine.distributed import CPUDistributedDataParallel


def outputs_and_loss(model: nn.Module, batch: Tensor | dict) -> tuple[list[Tensor], Tensor]:
    """Of a backbone, whose loss is the outputs' mean squares, or of a model with losses."""
    if isinstance(batch, dict):
        losses = model(**batch, mode='loss')
        return [], getattr(model, 'module', model).parse_losses(losses)[0]
    outputs = model(batch)
    return outputs, sum(out.square().mean() for out in outputs)


def mean_gradients(model: nn.Module, halves: list) -> dict[str, Tensor]:
    """What one process gets for each half of a batch, averaged."""
    grads = []
    for half in halves:
        one = copy.deepcopy(model).train()
        outputs_and_loss(one, half)[1].backward()
        grads.append({name: p.grad for name, p in one.named_parameters()})
    return {name: (grad + grads[1][name]) / 2 for name, grad in grads[0].items()}


def main() -> None:
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    results = []
    for model, batches in torch.load(sys.argv[1], weights_only=False):
        wrapper = CPUDistributedDataParallel(model.train(), device_ids=[rank])
        outputs, loss = outputs_and_loss(wrapper, batches[rank])
        loss.backward()
        results.append(
            {
                'outputs': [out.detach() for out in outputs],
                'grads': {name: p.grad.clone() for name, p in model.named_parameters()},
                'buffers': {name: b.clone() for name, b in model.named_buffers()},
            }
        )
        outputs_and_loss(wrapper, batches[rank])
    save_both_and_leave(results, sys.argv[2])


if __name__ == '__main__':
    main()
