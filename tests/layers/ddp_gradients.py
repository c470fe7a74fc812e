"""Gradients of an ACmix layer in DistributedDataParallel, for test_acmix.py; started by torchrun.

Each process takes its share of the batch, by the backend argv[1] on the device argv[2]. Both
processes' averaged gradients go to argv[3].
"""

import sys

import torch
from processes import save_both_and_leave
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from acmix_mm.layers import ACmix

distributed.init_process_group('gloo')
torch.manual_seed(0)
module, device = ACmix(8, 8, backend=sys.argv[1]), sys.argv[2]
module.to(device)
x = torch.randn(4, 8, 6, 7).to(device)
parallel = DistributedDataParallel(module)
parallel(x.chunk(2)[distributed.get_rank()]).square().mean().backward()
save_both_and_leave({name: p.grad.cpu() for name, p in module.named_parameters()}, sys.argv[3])
