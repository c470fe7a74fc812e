"""One training step of backbones in two processes, for test_san.py; started by torchrun.

argv[1] holds models and a batch, of which each process takes half. Both processes' outputs,
averaged gradients and buffers go to argv[2].
"""

import sys

import torch
from processes import save_both_and_leave
from torch import distributed


def main() -> None:
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    models, x = torch.load(sys.argv[1], weights_only=False)
    results = []
    for model in models:
        outputs = model(x.chunk(2)[rank])
        sum(out.square().mean() for out in outputs).backward()
        # As DistributedDataParallel does, which refuses nn.SyncBatchNorm on the CPU.
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        results.append(
            {
                'outputs': [out.detach() for out in outputs],
                'grads': {name: p.grad for name, p in model.named_parameters()},
                'buffers': dict(model.named_buffers()),
            }
        )
    save_both_and_leave(results, sys.argv[2])


if __name__ == '__main__':
    main()
