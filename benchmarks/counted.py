"""The launcher, which also counts the bytes that rank 0 sends to other ranks.

    torchrun ... -m benchmarks.counted SCRIPT [Megatron's flags]        in place of -m hgrn2_megatron

After each training step rank 0 prints how many bytes it sent. Every call of a sending function of torch.distributed
counts as many bytes as a ring of n ranks would send: (n - 1) / n of the whole tensor for all-gather, reduce-scatter,
all-to-all and broadcast, twice that for all-reduce, and all bytes of a message from one rank to another. The user
buffers of Transformer Engine's --tp-comm-overlap, objects that torch pickles, and barriers are not counted.
"""

import functools
import inspect
import runpy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# function -> the argument that holds the whole tensor or a list of its parts, and how many times a ring sends
# (n - 1) / n of it
COLLECTIVES = {
    "all_reduce": ("tensor", 2),
    "broadcast": ("tensor", 1),
    "all_gather": ("tensor_list", 1),
    "all_gather_into_tensor": ("output_tensor", 1),
    "_all_gather_base": ("output_tensor", 1),
    "reduce_scatter": ("input_list", 1),
    "reduce_scatter_tensor": ("input", 1),
    "_reduce_scatter_base": ("input", 1),
    "all_to_all": ("input_tensor_list", 1),
    "all_to_all_single": ("input", 1),
}


class Counter:
    """A counter of the bytes that this rank has sent since the last report."""

    def __init__(self):
        self.sent = 0.0

    def install(self):
        """Replace the functions of torch.distributed.

        Call it before Megatron is imported, because Megatron keeps some of them under names of its own.
        """
        for name, (tensor, times) in COLLECTIVES.items():
            setattr(dist, name, self._collective(getattr(dist, name), tensor, times))
        # batch_isend_irecv and send look isend up in the module distributed_c10d
        dist.isend = distributed_c10d.isend = self._message(dist.isend)

    def _collective(self, function: Callable, tensor: str, times: int) -> Callable:
        names = list(inspect.signature(function).parameters)

        def argument(name: str, args: tuple, kwargs: dict):
            place = names.index(name)
            return args[place] if place < len(args) else kwargs.get(name)

        @functools.wraps(function)
        def counting(*args, **kwargs):
            ranks = dist.get_world_size(argument("group", args, kwargs))
            if ranks > 1:
                self.sent += times * (ranks - 1) / ranks * num_bytes(argument(tensor, args, kwargs))
            return function(*args, **kwargs)

        return counting

    def _message(self, isend: Callable) -> Callable:
        @functools.wraps(isend)
        def counting(tensor, *args, **kwargs):
            self.sent += tensor.nbytes
            return isend(tensor, *args, **kwargs)

        return counting

    def reported(self, train_step: Callable) -> Callable:
        """Return a training step after which rank 0 prints how many bytes it has sent since the previous step."""

        @functools.wraps(train_step)
        def wrapped(*args, **kwargs):
            result = train_step(*args, **kwargs)
            if dist.get_rank() == 0:
                print(f"bytes sent: {self.sent:.0f}", flush=True)
            self.sent = 0
            return result

        return wrapped


def num_bytes(tensors: torch.Tensor | list[torch.Tensor]) -> int:
    """Return the bytes of a tensor, or of all tensors of a list."""
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(x.nbytes for x in tensors)


def main():
    counter = Counter()
    counter.install()
    run_script = runpy.run_path

    def run_path(*args, **kwargs):
        import megatron.training.training as training

        training.train_step = counter.reported(training.train_step)
        return run_script(*args, **kwargs)

    # the launcher calls run_path last, after it has imported the Megatron that the script uses
    runpy.run_path = run_path
    from hgrn2_megatron.__main__ import main as launch

    launch()


if __name__ == "__main__":
    main()
