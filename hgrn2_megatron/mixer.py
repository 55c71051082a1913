"""HGRN2Mixer, the token mixer that takes the place of self-attention in Megatron's TransformerLayer."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused
from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.context_parallel.operator import chunk_hgrn2_of_batch, chunk_hgrn2_of_packed, packed_layout
from hgrn2_megatron.context_parallel.pieces import STREAM
from hgrn2_megatron.generation import advance, advance_dynamic
from hgrn2_megatron.lower_bounds import LowerBounds
from hgrn2_megatron.muon import mark_parts
from hgrn2_megatron.norm_recompute import RecomputedNorm, recompute_in_backward
from hgrn2_megatron.offloading import IN_PROJ, OPERATOR, OUT_PROJ, OffloadGroup


@dataclasses.dataclass
class HGRN2MixerSubmodules:
    """Specs of the mixer's two projections.

    Attributes:
        in_proj: a column-parallel linear layer of Megatron or Transformer Engine.
        out_proj: a row-parallel linear layer of Megatron or Transformer Engine.
    """

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class HGRN2Mixer(MegatronModule):
    """HGRN2 token mixer: in_proj, gated linear recurrence, RMSNorm and out_proj.

    It works under tensor, sequence and context parallelism.

    in_proj is one fused column-parallel linear layer. Its rows are ordered by head, and within a head they are q, then
    f, then v. Megatron's own fused QKV has the same order. The rows of a tensor-parallel rank are therefore one
    contiguous slice that holds whole heads. This lets plain checkpoints change their TP size, and the same seed
    initializes the same model at every TP size.

    Args:
        config: Megatron's config of the model. Missing `hgrn2_*` fields have the defaults of HGRN2Config.
        submodules: specs of the two projections.
        layer_number: 1-based number of the layer in the whole model, as Megatron counts layers.
        pg_collection: process groups; None takes Megatron's global groups.
        pp_layer_offset: number of layers in the earlier pipeline stages. Only HybridStack passes it. None computes it
            from the config.
        name: module name for Megatron's quantization recipes.
        ignored: arguments that Megatron passes to every mixer and that HGRN2 does not use, such as cp_comm_type and
            attn_mask_type.

    Source: arXiv 2404.07904. The weights are the same as in fla's HGRN2Attention without short convolutions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HGRN2MixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        **ignored,
    ):
        super().__init__(config=config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        hgrn2 = HGRN2Config.of(config)
        hidden_size = config.hidden_size
        self.layer_number = layer_number
        self.pp_layer_offset = pp_layer_offset
        self.pp_group, self.cp_group = pg_collection.pp, pg_collection.cp
        self.packed_layout = packed_layout(config)
        self.head_dim = hgrn2.expand_ratio
        self._bounds: tuple[LowerBounds, int] | None = None
        self._needs_bounds = hgrn2.lower_bounds == "learned"
        # the flags with which Megatron recomputes the core of attention
        self._recomputes_core = config.recompute_granularity == "selective" and "core_attn" in (
            config.recompute_modules or ()
        )
        # Full recompute runs a layer's backward right after its forward, so freeing the norm's output saves nothing.
        self._keeps_norm_output = config.recompute_granularity == "full"
        self._offload_modules = (
            set(config.offload_modules or ()) if config.fine_grained_activation_offloading else set()
        )

        common = dict(config=config, bias=False, is_expert=False, tp_group=pg_collection.tp)
        self.in_proj = build_module(
            submodules.in_proj,
            hidden_size,
            3 * hidden_size,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            name=name and f"{name}.in_proj",
            **common,
        )
        # q, f and v are matrices of their own
        mark_parts(self.in_proj.weight, [self.head_dim] * 3, config)
        self.norm = RecomputedNorm(hidden_size, hgrn2.norm_eps, config, pg_collection.tp)
        self.out_proj = build_module(
            submodules.out_proj,
            hidden_size,
            hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            name=name and f"{name}.out_proj",
            **common,
        )

    def use_lower_bounds(self, bounds: LowerBounds, row: int):
        """Set the source of this layer's lower bound.

        Args:
            bounds: module that holds the lower bounds of the whole stack.
            row: 0-based row of this layer in the table.
        """
        # The tuple keeps the parameters of `bounds` out of this module.
        self._bounds = (bounds, row)

    def lower_bound(self) -> Tensor | None:
        """Return this layer's lower bound, [H/tp, K] fp32, or None if lower bounds are off."""
        if not self._needs_bounds:
            return None
        assert self._bounds, "the stack must call use_lower_bounds of every mixer before its first forward"
        bounds, row = self._bounds
        return bounds(row)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context=None,
        packed_seq_params=None,
        attention_bias: Tensor | None = None,
        **ignored,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each sequence over time.

        Args:
            hidden_states: [s, b, h], or [s/tp, b, h] under sequence parallelism, in the model's dtype. s counts the
                tokens of this context-parallel rank.
            attention_mask: ignored, because the recurrence is causal by construction.
            inference_context: Megatron's StaticInferenceContext or DynamicInferenceContext in generation, otherwise
                None. The context keeps the recurrent states. The dynamic one packs the tokens of all requests into one
                row.
            packed_seq_params: Megatron's PackedSeqParams if the batch is packed sequences [t, 1, h], otherwise None.
                Each sequence starts from an empty state. Padding after a sequence counts as a part of it. Tokens after
                the last sequence count as one more sequence. If it has a cp_group, this replaces the model's group.
                With the format sbhd, and either no boundaries or one sequence per row, it describes an unpacked batch.
            attention_bias: the lower bound, [H/tp, K] fp32, if Megatron trains with CUDA graphs of single layers, where
                it is an input of the graph (see layer.py). Ignored otherwise.
            ignored: other arguments that Megatron passes to attention.

        Returns:
            output: shape and dtype of hidden_states.
            bias: None, in the place of the bias that Megatron would add.

        Raises:
            ValueError: the mixer cannot generate with this parallelism or context, the packed sequences have another
                format or no boundaries, or nothing says how they are split over context-parallel ranks, or over which.
        """
        in_proj = self._offload_group(IN_PROJ, hidden_states, inference_context)
        with in_proj as hidden_states:
            qfv, _ = self.in_proj(hidden_states)
        qfv = in_proj.commit(qfv)
        s, b, _ = qfv.shape
        if inference_context is None:
            operator = self._training_operator(packed_seq_params, s, b)
        else:
            operator = self._inference_operator(inference_context, packed_seq_params)
        is_graph_input = self.config.cuda_graph_impl == "local" and attention_bias is not None
        lower_bound = attention_bias if is_graph_input else self.lower_bound()
        # [b, s, H/tp, 3, K]
        qfv = qfv.view(s, b, -1, 3, self.head_dim).transpose(0, 1)
        if self._recomputes_core and inference_context is None:
            operator = partial(tensor_parallel.checkpoint, operator, False)
        core = self._offload_group(OPERATOR, qfv, inference_context)
        with core as qfv:
            o = operator(qfv, lower_bound)
        return self._project(self._offload_group(OUT_PROJ, _merge_heads(core.commit(o)), inference_context))

    def _offload_group(self, name: str, x: Tensor, inference_context) -> OffloadGroup:
        trains = self.training and inference_context is None
        return OffloadGroup(trains and name in self._offload_modules, x, name)

    def _project(self, group: OffloadGroup) -> tuple[Tensor, Tensor | None]:
        """Apply the norm and out_proj to the group's tensor [s, b, h/tp]."""
        if group.offload:
            # Only the norm's input moves. The norm's output is computed again from it.
            norm = tensor_parallel.CheckpointWithoutOutput(fp8=None)
            with group as x:
                normed = norm.checkpoint(self.norm, x)
            output, bias = self.out_proj(normed)
            norm.discard_output_and_register_recompute(output)
            # The checkpoint makes a leaf of x, whose gradient's node holds it.
            return group.commit(output, release=x), bias
        normed = self.norm(group.tensor)
        projected = self.out_proj(normed)
        if not self._keeps_norm_output:
            recompute_in_backward(normed, projected[0])
        return projected

    def backward_dw(self) -> None:
        """Compute the gradients of the projections' weights, where `--delay-wgrad-compute` has put them off.

        Megatron's schedule that overlaps the exchanges of experts calls this after the layer's backward.
        """
        self.out_proj.backward_dw()
        self.in_proj.backward_dw()

    def _inference_operator(self, context, packed_seq_params) -> Callable:
        """Return the operator for the next tokens in generation: (qfv [b, s, H, 3, K], bound) to o [b, s, H, K]."""
        if self.cp_group.size() > 1 or packed_seq_params is not None:
            raise ValueError(
                "HGRN2 layers generate from unpacked sequences without context parallelism, got context parallelism "
                f"over {self.cp_group.size()} ranks and {'no ' if packed_seq_params is None else ''}packed_seq_params: "
                "drop --context-parallel-size and packed_seq_params"
            )
        if context.is_static_batching():
            if self.config.sequence_parallel:
                raise ValueError(
                    "HGRN2 layers cannot generate with a StaticInferenceContext and sequence parallelism, which "
                    "Megatron's static engine does not support: drop --sequence-parallel, or use Megatron's dynamic "
                    "engine"
                )
            if self.config.cuda_graph_impl == "local":
                raise ValueError(
                    "HGRN2 layers cannot generate with a StaticInferenceContext and --cuda-graph-impl local: Megatron "
                    "runs a step several times to capture it, and each run would advance the states of the layers. "
                    "Use Megatron's dynamic engine, or give --cuda-graph-impl none"
                )
            return partial(advance, context=context, layer_number=self.layer_number)
        offset = self.pp_layer_offset
        if offset is None:
            offset = get_transformer_layer_offset(self.config, pp_rank=self.pp_group.rank())
        return partial(advance_dynamic, context=context, layer_number=self.layer_number - offset)

    def _training_operator(self, packed_seq_params, num_tokens: int, batch: int) -> Callable:
        """Return the operator for these sequences: (qfv [b, s, H, 3, K], bound) to o [b, s, H, K]."""
        cu_seqlens = _packed_boundaries(packed_seq_params, batch)
        group = getattr(packed_seq_params, "cp_group", None) or self.cp_group
        # With hybrid context parallelism each batch has its own number of ranks. One rank alone has no group.
        num_ranks = getattr(packed_seq_params, "local_cp_size", None)
        if (num_ranks or 1) > 1 and num_ranks != group.size():
            raise ValueError(
                f"PackedSeqParams has local_cp_size {num_ranks}, but its cp_group, or without one the model's, has "
                f"{group.size()} ranks: set cp_group to the group of the {num_ranks} ranks that share the batch"
            )
        is_alone = (num_ranks or group.size()) == 1
        if cu_seqlens is None:
            return _chunk_hgrn2_on_one_rank if is_alone else partial(chunk_hgrn2_of_batch, group=group)
        if is_alone:
            end = cu_seqlens.new_full((1,), num_tokens)
            return partial(_chunk_hgrn2_on_one_rank, cu_seqlens=torch.cat([cu_seqlens, end]).int())
        layout = STREAM if num_ranks else self.packed_layout
        if layout is None:
            raise ValueError(
                f"hgrn2_packed_layout is not set, and PackedSeqParams does not say how {group.size()} context-parallel "
                'ranks split the packed sequences: set hgrn2_packed_layout of the config to "documents" if each '
                'document is cut into 2 * cp chunks, or to "stream" if the whole row is'
            )
        return partial(chunk_hgrn2_of_packed, group=group, cu_seqlens=cu_seqlens, layout=layout)


def _chunk_hgrn2_on_one_rank(qfv: Tensor, lower_bound: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    # The backward is faster with the states. A run that needs their memory recomputes (--recompute-granularity).
    return chunk_hgrn2_fused(qfv, lower_bound, cu_seqlens=cu_seqlens, save_states=True)[0]


def _packed_boundaries(packed_seq_params, batch: int) -> Tensor | None:
    """Return the boundaries of packed sequences with their padding, [n + 1] int32, or None for an unpacked batch.

    Raises:
        ValueError: the format is another one, or packed sequences have no boundaries.
    """
    p = packed_seq_params
    if p is None:
        return None
    cu_seqlens = p.cu_seqlens_q if p.cu_seqlens_q_padded is None else p.cu_seqlens_q_padded
    sequences = "no" if cu_seqlens is None else len(cu_seqlens) - 1
    # each row is one sequence with its padding at the end
    if p.qkv_format == "sbhd" and sequences in ("no", batch):
        return None
    if p.qkv_format != "thd" or batch != 1:
        raise ValueError(
            "HGRN2 layers take packed sequences in the format thd with a batch of 1, or in the format sbhd with one "
            f"sequence per row of the batch, got {p.qkv_format} of {sequences} sequences with a batch of {batch}: "
            "flatten the batch into one row of format thd, as Megatron's pretrain_gpt.py does"
        )
    if cu_seqlens is None:
        raise ValueError(
            "PackedSeqParams of the format thd has no boundaries, cu_seqlens_q is None: set cu_seqlens_q to [n + 1] "
            "int32 numbers from 0 to the end of the last of n sequences, or pass no PackedSeqParams for an unpacked "
            "batch"
        )
    return cu_seqlens


def _merge_heads(o: Tensor) -> Tensor:
    """Reshape [b, s, H, K] to [s, b, H * K]."""
    return o.transpose(0, 1).flatten(2)
