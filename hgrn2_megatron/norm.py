"""RMSNorms in plain PyTorch, over a hidden dimension that is sharded by tensor parallelism or whole on each rank."""

import torch
from megatron.core.jit import jit_fuser
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from hgrn2_kernels.once import once_differentiable
from hgrn2_megatron.tensor_parallel import mark_tensor_parallel, parameter_device


class HiddenShardedRMSNorm(torch.nn.Module):
    """RMSNorm over a hidden dimension that is sharded over tensor-parallel ranks.

    Each rank normalizes its slice by the mean square of all slices. The weight is sharded in the same way.

    Args:
        hidden_size: number of channels over all TP ranks.
        eps: number that is added to the mean square.
        config: Megatron's config, for the weight's dtype and device.
        tp_group: ranks that share the hidden dimension.

    Source: the output norm of HGRN2, arXiv 2404.07904. The weight has the format of fla's `g_norm`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
    ):
        super().__init__()
        self.hidden_size, self.eps, self.tp_group = hidden_size, eps, tp_group
        local = hidden_size // tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(local, dtype=config.params_dtype, device=parameter_device(config)))
        mark_tensor_parallel(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x.

        Args:
            x: [..., hidden/tp] in any floating-point dtype.

        Returns:
            Tensor with the shape and dtype of x. The arithmetic is fp32, or fp64 for an fp64 input.
        """
        if self.tp_group.size() == 1:
            # On a GPU this takes one pass over memory and keeps nothing in fp32.
            return torch.nn.functional.rms_norm(x, (self.hidden_size,), self.weight, self.eps).to(x.dtype)
        # With two dimensions, the compiled functions serve every sequence length and batch size.
        rows = x.reshape(-1, x.shape[-1])
        return _sharded_rms_norm(rows, self.weight, self.hidden_size, self.eps, self.tp_group).view(x.shape)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Return the entry `weight` of a distributed checkpoint, sharded over TP ranks on axis 0."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class _ShardedRMSNorm(torch.autograd.Function):
    """RMSNorm of a slice [tokens, channels].

    For the backward it keeps x in its own dtype and one number per token. The arithmetic between two all-reduces is one
    function, so that Megatron's fuser can make it one pass over memory.
    """

    @staticmethod
    def forward(ctx, x, weight, hidden_size, eps, group):
        ctx.hidden_size, ctx.group = hidden_size, group
        # Without this, the fuser compiles a second version for inputs that need gradients.
        rows, gain = x.detach(), weight.detach()
        square_sum = _square_sum(rows)
        torch.distributed.all_reduce(square_sum, group=group)
        normed, scale = _normalize(rows, gain, square_sum, hidden_size, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable(
        "the norm of HGRN2 layers over tensor-parallel ranks has no second derivative: leave create_graph out, or run "
        "with --tensor-model-parallel-size 1"
    )
    def backward(ctx, saved, dy):
        x, weight, scale = (x.detach() for x in saved)
        # The outputs of all ranks depend on the sum of squares, so its gradient is summed over the ranks.
        shared = _gradient_of_scale(x, weight, scale, dy)
        torch.distributed.all_reduce(shared, group=ctx.group)
        dx, dweight = _gradients(x, weight, scale, dy, shared, ctx.hidden_size)
        return dx, dweight, None, None, None


# torch.compile must break its graph here. PyTorch 2.11 would trace the function and silently lose its gradients.
_sharded_rms_norm = torch.compiler.disable(_ShardedRMSNorm.apply)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@jit_fuser
def _square_sum(x: Tensor) -> Tensor:
    return _at_least_fp32(x).square().sum(-1, keepdim=True)


@jit_fuser
def _normalize(x: Tensor, weight: Tensor, square_sum: Tensor, hidden_size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalized x, and the factor [tokens, 1] by which x was scaled before the weight."""
    scale = torch.rsqrt(square_sum / hidden_size + eps)
    return (_at_least_fp32(x) * scale * weight).to(x.dtype), scale


@jit_fuser
def _gradient_of_scale(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> Tensor:
    return (_at_least_fp32(dy) * weight * _at_least_fp32(x) * scale).sum(-1, keepdim=True)


@jit_fuser
def _gradients(
    x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, shared: Tensor, hidden_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    normed, dy = _at_least_fp32(x) * scale, _at_least_fp32(dy)
    dx = scale * (dy * weight - normed * (shared / hidden_size))
    return dx.to(x.dtype), (dy * normed).sum(0).to(weight.dtype)


class LocalRMSNorm:
    """Builder of a torch.nn.RMSNorm that works with sequence parallelism, for `--transformer-impl local`.

    Under sequence parallelism each TP rank sees only a part of the sequence, so the weight's gradient must be summed
    over the TP ranks. Megatron's own torch norm does not mark its weight for this sum. It refuses sequence parallelism.

    Args:
        config: Megatron's config, for the weight's dtype, its device and sequence parallelism.
        hidden_size: number of channels.
        eps: number that is added to the mean square.
        ignored: other arguments that Megatron passes to a norm.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **ignored) -> torch.nn.RMSNorm:
        norm = torch.nn.RMSNorm(hidden_size, eps, device=parameter_device(config), dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm
