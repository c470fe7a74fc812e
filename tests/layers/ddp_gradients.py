"""Gradients of an ACmix layer in DistributedDataParallel, for test_acmix.py; started by torchrun.

Each process takes its share of the batch, by the backend argv[1] on the device argv[2]; the first
writes the averaged gradients to argv[3].
"""

import os
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from acmix_mm.layers import ACmix

distributed.init_process_group('gloo')
torch.manual_seed(0)
module, device = ACmix(8, 8, backend=sys.argv[1]), sys.argv[2]
module.to(device)
x = torch.randn(4, 8, 6, 7).to(device)
rank, processes = distributed.get_rank(), distributed.get_world_size()
assert processes == 2
parallel = DistributedDataParallel(module)
parallel(x.chunk(processes)[rank]).square().mean().backward()
if rank == 0:
    torch.save({name: p.grad for name, p in module.named_parameters()}, sys.argv[3])
# Past the destructors: once in many runs, a thread of the process group outlives it, and aborts.
distributed.barrier()
os._exit(0)
