"""RMSNorms in plain PyTorch: over a hidden dimension sharded over TP, and over a whole one under SP."""

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
    """RMSNorm over the full hidden size of which a TP rank holds one slice.

    Each rank normalises its slice by the mean square of all slices; the weight is sharded as the channels are.

    Args:
        hidden_size: channels over all TP ranks.
        eps: added to the mean square.
        config: for the weight's dtype and device.
        tp_group: ranks that share the hidden dimension.

    Source: the output norm of HGRN2, arXiv 2404.07904; weight format of fla's `g_norm`.
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
        """Normalise x: [..., hidden/tp], any float dtype; the arithmetic is fp32 (fp64 for fp64), the dtype x's."""
        if self.tp_group.size() == 1:
            # one pass over memory on a GPU, and nothing kept in fp32
            return torch.nn.functional.rms_norm(x, (self.hidden_size,), self.weight, self.eps).to(x.dtype)
        # as rows: what is compiled for one length and batch is for all
        rows = x.reshape(-1, x.shape[-1])
        return _sharded_rms_norm(rows, self.weight, self.hidden_size, self.eps, self.tp_group).view(x.shape)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Megatron's distributed checkpoint entry: `weight`, sharded over TP on axis 0."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class _ShardedRMSNorm(torch.autograd.Function):
    """The norm of a slice, [tokens, channels]; kept for the backward are x in its own dtype and one number a token.

    Between two all-reduces everything is one function, which Megatron's fuser makes one pass over memory of.
    """

    @staticmethod
    def forward(ctx, x, weight, hidden_size, eps, group):
        ctx.hidden_size, ctx.group = hidden_size, group
        # what needs gradients and what does not would be compiled apart
        rows, gain = x.detach(), weight.detach()
        square_sum = _square_sum(rows)
        torch.distributed.all_reduce(square_sum, group=group)
        normed, scale = _normalize(rows, gain, square_sum, hidden_size, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable(
        "HGRN2's norm over tensor parallel ranks has no second derivative: leave create_graph out, or run with "
        "--tensor-model-parallel-size 1"
    )
    def backward(ctx, saved, dy):
        x, weight, scale = (x.detach() for x in saved)
        # every rank's output depends on the sum of squares, so its gradient is summed over the ranks as well
        shared = _gradient_of_scale(x, weight, scale, dy)
        torch.distributed.all_reduce(shared, group=ctx.group)
        dx, dweight = _gradients(x, weight, scale, dy, shared, ctx.hidden_size)
        return dx, dweight, None, None, None


# torch.compile breaks its graph here: PyTorch 2.11 would trace the function and lose its gradients without a word
_sharded_rms_norm = torch.compiler.disable(_ShardedRMSNorm.apply)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@jit_fuser
def _square_sum(x: Tensor) -> Tensor:
    return _wide(x).square().sum(-1, keepdim=True)


@jit_fuser
def _normalize(x: Tensor, weight: Tensor, square_sum: Tensor, hidden_size: int, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and what x was multiplied by."""
    scale = torch.rsqrt(square_sum / hidden_size + eps)
    return (_wide(x) * scale * weight).to(x.dtype), scale


@jit_fuser
def _gradient_of_scale(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> Tensor:
    return (_wide(dy) * weight * _wide(x) * scale).sum(-1, keepdim=True)


@jit_fuser
def _gradients(
    x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, shared: Tensor, hidden_size: int
) -> tuple[Tensor, Tensor]:
    """Of x and of the weight."""
    normed, dy = _wide(x) * scale, _wide(dy)
    dx = scale * (dy * weight - normed * (shared / hidden_size))
    return dx.to(x.dtype), (dy * normed).sum(0).to(weight.dtype)


class LocalRMSNorm:
    """Builder of the block norms of `--transformer-impl local`: torch.nn.RMSNorm that knows sequence parallelism.

    Megatron's own torch norm refuses sequence parallelism, because it does not tag its weight for the
    gradient's sum over the TP ranks, each of which sees only its part of the sequence.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **ignored) -> torch.nn.RMSNorm:
        norm = torch.nn.RMSNorm(hidden_size, eps, device=parameter_device(config), dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm
