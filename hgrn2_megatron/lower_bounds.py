"""Lower bounds of the forget gates, which come from one learned table for all layers of the model."""

import dataclasses

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from hgrn2_megatron.settings import global_args
from hgrn2_megatron.tensor_parallel import mark_tensor_parallel, parameter_device


class LowerBounds(torch.nn.Module):
    """The table Gamma [num_layers, hidden] from which every HGRN2 block gets its lower bound.

        P = softmax(Gamma, dim=0),   b_l = sum of P_1 .. P_l   (b_0 = 0 exactly)

    Every row of Gamma influences every bound through the softmax. A mixer calls this module to get its bound, so that
    Megatron's forward hooks, which gather parameters, run first.

    The parameter is stored flat, because Megatron applies weight decay to two-dimensional parameters and not to
    one-dimensional ones. It has the model's dtype, because Megatron's plain mixed-precision optimizer cannot save a
    parameter that is fp32 in a bf16 model. That optimizer keeps an fp32 copy of every parameter, also of this one. The
    bounds themselves are fp32, or fp64 in an fp64 model.

    Every model chunk of every pipeline stage holds a replica, even a chunk without HGRN2 layers. Before a step Megatron
    sums the gradients of the replicas, as it does for the embedders of diffusion models. Only one replica counts in the
    gradient norm. The parameter has a bucket of its own, so that the distributed optimizer splits all replicas into the
    same shards.

    Args:
        num_layers: number of blocks in the whole model, including the attention blocks of a hybrid. In a HybridModel,
            where mixers and channel mixers are separate layers, a block is a mixer.
        num_heads: number of heads over all TP ranks.
        head_dim: K, gate channels per head.
        config: Megatron's config, for the weight's dtype and device.
        tp_group: ranks that share the heads.
        pp_group: pipeline stages, each of which holds a replica.
        first: whether the model chunk is the first of the model. The replica of the first chunk is counted and saved.

    Source: arXiv 2404.07904, section 3, and `lower_bounds` of fla's HGRN2Model, which also starts from zeros.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        pp_group: torch.distributed.ProcessGroup,
        first: bool = True,
    ):
        super().__init__()
        self.num_layers, self.head_dim, self.tp_group = num_layers, head_dim, tp_group
        self.replica = 0 if first else 1 + pp_group.rank()
        local = num_layers * (num_heads // tp_group.size()) * head_dim
        self.weight = torch.nn.Parameter(torch.zeros(local, dtype=config.params_dtype, device=parameter_device(config)))
        mark_tensor_parallel(self.weight)
        # Megatron-FSDP reduces the gradient of a parameter with this mark once, at the end of a backward. Without the
        # mark it would reduce what each recomputed layer adds, as if that were the whole gradient.
        self.weight._is_shared = True
        if pp_group.size() > 1:
            # Megatron's _allreduce_conditional_embedding_grads sums gradients with this mark over the pipeline stages,
            # if the config has has_cond_embedder.
            self.weight.pipeline_parallel = True
            # The gradient norm leaves shared parameters out.
            self.weight.shared = self.replica > 0
        if pp_group.size() > 1 or getattr(global_args(), "use_megatron_fsdp", False):
            # The gradient buffers give shared embeddings a bucket of their own. In a bucket with the output layer, that
            # layer's gradient would have to wait for the end of the backward.
            self.weight.shared_embedding = True

    def forward(self, layer: int) -> Tensor:
        """Return the lower bound of one block.

        Args:
            layer: 0-based number of the block in the whole model.

        Returns:
            [H/tp, K] fp32 in [0, 1), or fp64 in an fp64 model.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        probs = torch.softmax(self.weight.view(self.num_layers, -1), dim=0, dtype=dtype)
        return probs[1 : layer + 1].sum(0).view(-1, self.head_dim)

    def tie(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states unchanged, and give the weight a gradient of zero in the backward.

        A model chunk without HGRN2 layers needs this, because Megatron waits for the gradient of every parameter.

        Args:
            hidden_states: tensor of any shape and dtype.
        """
        if not torch.is_grad_enabled():
            return hidden_states
        tied = _Tie.apply(hidden_states, self(0))
        # Pipeline schedules free the outputs of a stage, and refuse to free a view.
        return make_viewless_tensor(tied, requires_grad=True, keep_graph=True)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Return the entry `weight` [num_layers, hidden] of a distributed checkpoint, sharded over TP ranks on axis 1.

        It is saved with two dimensions, so that its shape shows the depth and the width, and the TP size can change
        between saving and loading. The factory passes the flat parameter to Megatron, which finds the optimizer's state
        by it.
        """
        dp_cp_group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def build(key, flat, replica_id, flattened_range):
            assert flattened_range is None, (
                "Megatron asked for a range of the flat parameter, which is only saved whole"
            )
            table = flat.view(self.num_layers, -1)
            return [ShardedTensor.from_rank_offsets(key, table, (1, tp_rank, tp_size), replica_id=replica_id)]

        def merge(shards):
            # This must be a copy, because Megatron may pass the same loaded tensor to every replica of this rank.
            return shards[0].reshape(-1).clone()

        replica_id = (self.replica, 0, dp_cp_group.rank())
        key = f"{prefix}weight"
        return {key: ShardedTensorFactory(key, self.weight, build, merge, replica_id)}


@dataclasses.dataclass(frozen=True)
class DetachedBounds:
    """Lower bounds without a gradient, for the heads of multi-token prediction under `--mtp-detach-heads`.

    Attributes:
        bounds: the lower bounds of the stack.
    """

    bounds: LowerBounds

    def __call__(self, layer: int) -> Tensor:
        """Return the lower bound of one block, as `LowerBounds` does."""
        return self.bounds(layer).detach()


class _Tie(torch.autograd.Function):
    """Return x, and give the bound a gradient of zero."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.save_for_backward(bound)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        (bound,) = ctx.saved_tensors
        return dx, torch.zeros_like(bound)
