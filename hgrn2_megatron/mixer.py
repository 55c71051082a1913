"""HGRN2Mixer: the token mixer in the self_attention slot of Megatron's TransformerLayer."""

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
from hgrn2_megatron.context_parallel import chunk_hgrn2_of_batch, chunk_hgrn2_of_packed, packed_layout
from hgrn2_megatron.generation import advance, advance_dynamic
from hgrn2_megatron.lower_bounds import LowerBounds
from hgrn2_megatron.norm import HiddenShardedRMSNorm
from hgrn2_megatron.pieces import STREAM


@dataclasses.dataclass
class HGRN2MixerSubmodules:
    """The two projections: column- and row-parallel linears of Megatron or Transformer Engine."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class HGRN2Mixer(MegatronModule):
    """in_proj -> gated linear recurrence -> RMSNorm -> out_proj, under tensor and sequence parallelism.

    in_proj is one fused column-parallel linear. Its rows go head by head, within a head q then f then i, the
    order Megatron's own fused QKV takes: a TP rank's rows are then a contiguous slice that holds whole heads,
    so plain checkpoints reshard over TP, and the same seed draws the same model at every TP size.

    Args:
        config: Megatron's; the `hgrn2_*` fields where the launcher put them.
        submodules: the two projections.
        layer_number: 1-based over all layers of the model, as Megatron counts them.
        pg_collection: process groups; Megatron's global ones when None.
        pp_layer_offset: layers in the pipeline stages before, which HybridStack alone gives; None where Megatron's
            config says it.
        name: module name for Megatron's quantization recipes.
        ignored: what Megatron hands every mixer and HGRN2 has no use for (cp_comm_type, attn_mask_type).

    Source: arXiv 2404.07904; weights as in fla's HGRN2Attention without short convolution.
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
        # Megatron's flags for attention's own part
        self._recomputes = config.recompute_granularity == "selective" and "core_attn" in (
            config.recompute_modules or ()
        )
        # what the norm makes for out_proj is then kept by nobody, or in another form, or is being copied elsewhere
        self._keeps_normed = config.recompute_granularity == "full" or config.fp8 or config.cpu_offloading

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
        self.norm = HiddenShardedRMSNorm(hidden_size, hgrn2.norm_eps, config, pg_collection.tp)
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
        """Take the bound `row` of the block's holder; a tuple keeps it out of this module's own parameters."""
        self._bounds = (bounds, row)

    def lower_bound(self) -> Tensor | None:
        """This layer's bound, [H/tp, K] fp32, or None where bounds are off."""
        if not self._needs_bounds:
            return None
        assert self._bounds, "the block gives every mixer its lower bounds"
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
        """Mix tokens over time.

        Args:
            hidden_states: [s, b, h], or [s/tp, b, h] under sequence parallelism.
            attention_mask: ignored, the recurrence is causal by construction; so is what else attention takes.
            inference_context: Megatron's StaticInferenceContext or DynamicInferenceContext in generation, which keeps
                the states; else None. The dynamic one has packed the tokens of all requests into one row.
            packed_seq_params: Megatron's PackedSeqParams of packed sequences [t, 1, h], each of which starts from an
                empty state. Padding behind a sequence belongs to it; what lies behind the last one is one more. Its
                cp_group, where it has one, takes the place of the model's.
            attention_bias: ignored but with CUDA graphs of single layers in training, where it is the lower bound,
                [H/tp, K] fp32, an input of the graph (see layer.py).

        Returns:
            output: like hidden_states, and None for the bias Megatron would add.

        Raises:
            ValueError: generation in another layout, or with what the context's own states do not allow; sequences
                packed in another format, or dealt out to context parallel ranks in an unknown layout.
        """
        qfi, _ = self.in_proj(hidden_states)
        s, b, _ = qfi.shape
        if inference_context is None:
            operator = self._operator(packed_seq_params, s, b)
        else:
            operator = self._generator(inference_context, packed_seq_params)
        given = self.config.cuda_graph_impl == "local" and attention_bias is not None
        lower_bound = attention_bias if given else self.lower_bound()
        # [b, s, H/tp, 3, K]
        qfi = qfi.view(s, b, -1, 3, self.head_dim).transpose(0, 1)
        if self._recomputes and inference_context is None:
            mix = partial(self._mix, operator)
            return self.out_proj(tensor_parallel.checkpoint(mix, False, qfi, lower_bound))
        o = _of_tokens(operator(qfi, lower_bound))
        normed = self.norm(o)
        projected = self.out_proj(normed)
        if normed.requires_grad and not self._keeps_normed:
            _free_until_backward(normed, partial(self.norm, o.detach()), projected[0])
        return projected

    def _generator(self, context, packed_seq_params) -> Callable:
        """The operator of [b, s, H, 3, K] and the bound for the next tokens of what this context generates."""
        if self.config.sequence_parallel or self.cp_group.size() > 1 or packed_seq_params is not None:
            raise ValueError(
                "HGRN2 layers generate from unpacked sequences without sequence or context parallelism: drop "
                "--sequence-parallel and --context-parallel-size"
            )
        if context.is_static_batching():
            if self.config.cuda_graph_impl == "local":
                raise ValueError(
                    "Megatron runs a static step several times to capture it in a CUDA graph, and each run would "
                    "advance the states of HGRN2 layers: use its dynamic engine, or --cuda-graph-impl none"
                )
            return partial(advance, context=context, layer_number=self.layer_number)
        offset = self.pp_layer_offset
        if offset is None:
            offset = get_transformer_layer_offset(self.config, pp_rank=self.pp_group.rank())
        return partial(advance_dynamic, context=context, layer_number=self.layer_number - offset)

    def _operator(self, packed_seq_params, num_tokens: int, batch: int) -> Callable:
        """The operator of [b, s, H, 3, K] and the bound for these sequences."""
        p = packed_seq_params
        if p is None:
            if self.cp_group.size() == 1:
                return _of_whole
            return partial(chunk_hgrn2_of_batch, group=self.cp_group)
        if p.qkv_format != "thd" or batch != 1:
            raise ValueError(
                f"HGRN2 layers take packed sequences as thd with a batch of 1, got {p.qkv_format} with {batch}: "
                "flatten the batch into one row, as Megatron's pretrain_gpt.py does"
            )
        borders = p.cu_seqlens_q if p.cu_seqlens_q_padded is None else p.cu_seqlens_q_padded
        group, layout = getattr(p, "cp_group", None) or self.cp_group, self.packed_layout
        # hybrid context parallelism: each batch has ranks of its own, and one rank alone no group
        ranks = getattr(p, "local_cp_size", None)
        if ranks:
            layout = STREAM
        if (ranks or group.size()) == 1:
            end = borders.new_full((1,), num_tokens)
            return partial(_of_whole, cu_seqlens=torch.cat([borders, end]).int())
        if layout is None:
            raise ValueError(
                "PackedSeqParams does not say how packed sequences are dealt out to context parallel ranks: set "
                "hgrn2_packed_layout of the config to documents (each is cut into 2 * cp chunks) or stream (all are)"
            )
        return partial(chunk_hgrn2_of_packed, group=group, cu_seqlens=borders, layout=layout)

    def _mix(self, operator: Callable, qfi: Tensor, lower_bound: Tensor | None) -> Tensor:
        """The operator and the norm: qfi [b, s, H/tp, 3, K] to [s, b, h/tp]."""
        return self.norm(_of_tokens(operator(qfi, lower_bound)))


def _of_whole(qfv: Tensor, lower_bound: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    return chunk_hgrn2_fused(qfv, lower_bound, cu_seqlens=cu_seqlens)[0]


def _of_tokens(o: Tensor) -> Tensor:
    """[b, s, H, K] to [s, b, H K]."""
    return o.transpose(0, 1).flatten(2)


def _free_until_backward(x: Tensor, make: Callable[[], Tensor], user: Tensor) -> None:
    """Free the memory of x, which autograd keeps for the backward of `user` alone, until user's gradient is there.

    Megatron's CheckpointWithoutOutput does the same, and compiles C++ in the first backward for it.

    Args:
        x: has its storage for itself.
        make: gives the same numbers again.
        user: computed from x, which nothing else reads any more.
    """
    storage, x = x.untyped_storage(), x.detach()
    size = storage.nbytes()
    storage.resize_(0)

    def restore(gradient: Tensor) -> None:
        storage.resize_(size)
        # the numbers that autograd has kept, so that it need not find them changed
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(x):
            x.copy_(make())

    user.register_hook(restore)
