"""Operators with nn.SyncBatchNorm in two processes, for test_batch_norm.py; started by torchrun.

argv[1] holds a list of cases: (name of the operator, keyword arguments, batches of both processes,
gradients of both outputs). Both processes' results go to argv[2].
"""

import sys

import torch
from processes import save_both_and_leave
from torch import distributed

from acmix_mm import ops
from acmix_mm.ops._batch_norm import batch_norm


def main() -> None:
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    results = []
    for name, kwargs, batches, grads in torch.load(sys.argv[1], weights_only=False):
        inputs = [t.requires_grad_() for t in batches[rank]]
        norm = kwargs['norm']
        parameters = [*norm.parameters(), *(t for t in kwargs.values() if torch.is_tensor(t))]
        function = batch_norm if name == 'batch_norm' else getattr(ops, name)
        out = function(*inputs, **kwargs)
        result = {'grads': torch.autograd.grad(out, [*inputs, *parameters], grads[rank])}
        results.append({**result, 'output': out.detach(), 'state': norm.state_dict()})
    save_both_and_leave(results, sys.argv[2])


if __name__ == '__main__':
    main()
