"""Megatron's own linear layers with weight gradients that wait for `backward_dw`, as Transformer Engine's have them.

These layers do not support tensor parallelism.
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        ctx.layer.waiting.append((x.detach().flatten(0, -2), dy.flatten(0, -2)))
        return dy @ weight, None, None


class _Delayed:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waiting, self.hooks = [], []
        # Megatron's data parallelism then leaves its hook with the module.
        self.weight.skip_backward_post_hook = True

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        self.hooks.append(hook)

    def forward(self, x, *args, **kwargs):
        return _Linear.apply(x, self.weight, self), None

    def backward_dw(self):
        x, dy = self.waiting.pop(0)
        self.weight.grad = dy.t() @ x
        for hook in self.hooks:
            hook()


class DelayedColumnLinear(_Delayed, ColumnParallelLinear):
    """In the place of TEColumnParallelLinear."""


class DelayedRowLinear(_Delayed, RowParallelLinear):
    """In the place of TERowParallelLinear."""


def install(delayed: bool) -> None:
    """Let Megatron build layers from these classes in this process, or with `delayed=False` from its own again."""
    from megatron.core.models.backends import LocalSpecProvider

    column, row = (DelayedColumnLinear, DelayedRowLinear) if delayed else (ColumnParallelLinear, RowParallelLinear)
    LocalSpecProvider.column_parallel_linear = lambda self: column
    LocalSpecProvider.row_parallel_linear = lambda self: row
