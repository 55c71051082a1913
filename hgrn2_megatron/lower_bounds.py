"""Lower bounds of the forget gates: one learned table for the whole depth."""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from hgrn2_megatron.tensor_parallel import mark_tensor_parallel, parameter_device


class LowerBounds(torch.nn.Module):
    """Holder of Gamma [num_layers, hidden], from which every HGRN2 block takes its bound.

        P = softmax(Gamma, dim=0),   b_l = sum of P_1 .. P_l   (b_0 = 0 exactly)

    Every row reaches every bound through the softmax. A block that needs its bound calls the holder, so that
    Megatron's forward hooks (parameter gathering) run first. The parameter is stored flat, because Megatron
    decays two-dimensional weights and leaves one-dimensional ones alone. It has the model's dtype, beside the fp32
    copy that Megatron's optimizer keeps of every parameter: its plain mixed-precision optimizer cannot save a
    parameter that is fp32 in a bf16 model. The bounds themselves are fp32.

    Every model chunk of every pipeline stage holds a replica, whatever its layers. Megatron sums the gradients of
    replicas before a step, as it does for the embedders of diffusion models, and all but one stay out of the
    gradient's norm. A bucket of its own gives the replicas the same shards in the distributed optimizer.

    Args:
        num_layers: L, blocks of the whole model, attention blocks of a hybrid included. In a HybridModel, whose mixers
            and channel mixers are layers of their own, a block is a mixer.
        num_heads: heads over all TP ranks.
        head_dim: K, gate channels a head.
        config: for the weight's dtype and device.
        tp_group: ranks among which heads are divided.
        pp_group: pipeline stages, each of which has a replica.
        first: whether the chunk is the model's first, whose replica is the one that is counted and saved.

    Source: arXiv 2404.07904, section 3; fla's HGRN2Model (`lower_bounds`, zeros at init).
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
        if pp_group.size() > 1:
            # read by Megatron's _allreduce_conditional_embedding_grads, where the config has has_cond_embedder
            self.weight.pipeline_parallel = True
            # by the gradient's norm
            self.weight.shared = self.replica > 0
            # by the layout of the gradient buffers: a bucket of its own
            self.weight.shared_embedding = True

    def forward(self, layer: int) -> Tensor:
        """Bound of block `layer` (0-based over all blocks): [H/tp, K] fp32 in [0, 1)."""
        probs = torch.softmax(self.weight.view(self.num_layers, -1), dim=0, dtype=torch.float32)
        return probs[1 : layer + 1].sum(0).view(-1, self.head_dim)

    def tie(self, hidden_states: Tensor) -> Tensor:
        """hidden_states themselves, through which the weight gets a gradient of zero.

        For a chunk without an HGRN2 layer: Megatron waits for the gradient of every parameter.
        """
        if not torch.is_grad_enabled():
            return hidden_states
        tied = _Tie.apply(hidden_states, self(0))
        # pipeline schedules free outputs, and refuse a view
        return make_viewless_tensor(tied, requires_grad=True, keep_graph=True)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Distributed checkpoint entry `weight` [num_layers, hidden], TP-sharded on axis 1.

        Saved two-dimensional so that its shape says depth and width and TP can change between save and load; the
        factory hands Megatron the flat parameter itself, by which it finds the optimizer's state.
        """
        dp_cp_group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def build(key, flat, replica_id, flattened_range):
            assert flattened_range is None, "the flat parameter is never split further here"
            table = flat.view(self.num_layers, -1)
            return [ShardedTensor.from_rank_offsets(key, table, (1, tp_rank, tp_size), replica_id=replica_id)]

        def merge(shards):
            # a copy: Megatron may hand the same loaded tensor to every replica that this rank holds
            return shards[0].reshape(-1).clone()

        replica_id = (self.replica, 0, dp_cp_group.rank())
        key = f"{prefix}weight"
        return {key: ShardedTensorFactory(key, self.weight, build, merge, replica_id)}


class _Tie(torch.autograd.Function):
    """x, and a gradient of zero for the bound."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.save_for_backward(bound)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        (bound,) = ctx.saved_tensors
        return dx, torch.zeros_like(bound)
