"""Two ranks gather a tensor in the CPU mode, and the second rank starts late. For torchrun; not a test."""

import time

import torch
import torch.distributed as dist

from hgrn2_megatron import cpu

cpu.install()
dist.init_process_group("gloo")
own, gathered = torch.tensor([dist.get_rank() + 1.0]), torch.zeros(2)
if dist.get_rank() == 1:
    time.sleep(1)
with dist._coalescing_manager(async_ops=True):
    dist.all_gather_into_tensor(gathered, own, async_op=True)
assert gathered.tolist() == [1, 2], gathered
dist.destroy_process_group()
