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
from hgrn2_megatron.context_parallel.operator import chunk_hgrn2_of_batch, chunk_hgrn2_of_packed, packed_layout
from hgrn2_megatron.context_parallel.pieces import STREAM
from hgrn2_megatron.generation import advance, advance_dynamic
from hgrn2_megatron.lower_bounds import LowerBounds
from hgrn2_megatron.norm import HiddenShardedRMSNorm


@dataclasses.dataclass
class HGRN2MixerSubmodules:
    """The two projections: column- and row-parallel linears of Megatron or Transformer Engine."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class HGRN2Mixer(MegatronModule):
    """in_proj -> gated linear recurrence -> RMSNorm -> out_proj, under tensor and sequence parallelism.

    in_proj is one fused column-parallel linear. Its rows go head by head, within a head q then f then v, the
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
        # the layer's backward then follows its forward at once, and nothing is kept between them
        self._keeps_normed = config.recompute_granularity == "full"

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
        self.norm = _Norm(hidden_size, hgrn2.norm_eps, config, pg_collection.tp)
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
        """Take the bound `row` of the stack's holder; a tuple keeps it out of this module's own parameters."""
        self._bounds = (bounds, row)

    def lower_bound(self) -> Tensor | None:
        """This layer's bound, [H/tp, K] fp32, or None where bounds are off."""
        if not self._needs_bounds:
            return None
        assert self._bounds, "the stack gives every mixer its lower bounds"
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
                cp_group, where it has one, takes the place of the model's. One of the format sbhd, without borders or
                with those of a sequence a row, is an unpacked batch.
            attention_bias: ignored but with CUDA graphs of single layers in training, where it is the lower bound,
                [H/tp, K] fp32, an input of the graph (see layer.py).

        Returns:
            output: like hidden_states, and None for the bias Megatron would add.

        Raises:
            ValueError: generation in another layout, or with what the context's own states do not allow; sequences
                packed in another format or without borders, or dealt out to context parallel ranks in an unknown
                layout.
        """
        qfv, _ = self.in_proj(hidden_states)
        s, b, _ = qfv.shape
        if inference_context is None:
            operator = self._operator(packed_seq_params, s, b)
        else:
            operator = self._generator(inference_context, packed_seq_params)
        given = self.config.cuda_graph_impl == "local" and attention_bias is not None
        lower_bound = attention_bias if given else self.lower_bound()
        # [b, s, H/tp, 3, K]
        qfv = qfv.view(s, b, -1, 3, self.head_dim).transpose(0, 1)
        if self._recomputes and inference_context is None:
            mix = partial(self._mix, operator)
            return self.out_proj(tensor_parallel.checkpoint(mix, False, qfv, lower_bound))
        normed = self.norm(_of_tokens(operator(qfv, lower_bound)))
        projected = self.out_proj(normed)
        if not self._keeps_normed:
            _make_again(normed, projected[0])
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
        borders = _borders(packed_seq_params, batch)
        group = getattr(packed_seq_params, "cp_group", None) or self.cp_group
        # hybrid context parallelism: each batch has ranks of its own, and one rank alone no group
        ranks = getattr(packed_seq_params, "local_cp_size", None)
        alone = (ranks or group.size()) == 1
        if borders is None:
            return _of_whole if alone else partial(chunk_hgrn2_of_batch, group=group)
        if alone:
            end = borders.new_full((1,), num_tokens)
            return partial(_of_whole, cu_seqlens=torch.cat([borders, end]).int())
        layout = STREAM if ranks else self.packed_layout
        if layout is None:
            raise ValueError(
                "PackedSeqParams does not say how packed sequences are dealt out to context parallel ranks: set "
                "hgrn2_packed_layout of the config to documents (each is cut into 2 * cp chunks) or stream (all are)"
            )
        return partial(chunk_hgrn2_of_packed, group=group, cu_seqlens=borders, layout=layout)

    def _mix(self, operator: Callable, qfv: Tensor, lower_bound: Tensor | None) -> Tensor:
        """The operator and the norm: qfv [b, s, H/tp, 3, K] to [s, b, h/tp]."""
        return self.norm(_of_tokens(operator(qfv, lower_bound)))


def _of_whole(qfv: Tensor, lower_bound: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    return chunk_hgrn2_fused(qfv, lower_bound, cu_seqlens=cu_seqlens)[0]


def _borders(packed_seq_params, batch: int) -> Tensor | None:
    """Borders of packed sequences with their padding, [n + 1] int32; None for an unpacked batch.

    Raises:
        ValueError: another format, or packed sequences without borders.
    """
    p = packed_seq_params
    if p is None:
        return None
    borders = p.cu_seqlens_q if p.cu_seqlens_q_padded is None else p.cu_seqlens_q_padded
    sequences = "no" if borders is None else len(borders) - 1
    # a sequence a row, and its padding behind it
    if p.qkv_format == "sbhd" and sequences in ("no", batch):
        return None
    if p.qkv_format != "thd" or batch != 1:
        raise ValueError(
            "HGRN2 layers take packed sequences as thd with a batch of 1, and sbhd as an unpacked batch, got "
            f"{p.qkv_format} of {sequences} sequences with a batch of {batch}: flatten the batch into one row, as "
            "Megatron's pretrain_gpt.py does"
        )
    if borders is None:
        raise ValueError(
            "PackedSeqParams of thd has no borders: give cu_seqlens_q, [n + 1] int32 from 0 to the end of the last "
            "of n sequences, or no PackedSeqParams for an unpacked batch"
        )
    return borders


def _of_tokens(o: Tensor) -> Tensor:
    """[b, s, H, K] to [s, b, H K]."""
    return o.transpose(0, 1).flatten(2)


class _Norm(HiddenShardedRMSNorm):
    """The norm, whose output carries how it is made again until `_make_again` takes that off."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            # on the tensor: a hook may give the norm another x, or what comes next another y
            vars(y)[_RECIPE] = y._version, partial(super().forward, x.detach())
        return y


_RECIPE = "hgrn2_recipe"


def _make_again(x: Tensor, user: Tensor) -> None:
    """Have autograd make x again for the backward of `user`, so that in between it need not keep x.

    Nothing is freed here. The memory of x is free once nobody holds it any more, and whoever does, a hook, a view or an
    alias, finds it as it was. Made again is what a function has saved by `save_for_backward`, as all linear layers of
    Megatron and Transformer Engine do. Saved-tensor hooks of others, which move it elsewhere, are left alone. Such
    hooks around out_proj would be simpler, but its backward would get a plain tensor for the weight, without what
    Megatron has put on the parameter.

    Args:
        x: what `_Norm` has made, or what a hook has put in its place, which is kept.
        user: computed from x, and not yet used.
    """
    version, make = vars(x).pop(_RECIPE, (None, None))
    if version is None or x.grad_fn is None or x._version != version:
        return
    memory = x.untyped_storage().data_ptr()

    def make_view(packed: tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        with torch.no_grad():
            return make().as_strided(*packed)

    for saved in _saved_since(x.grad_fn, user.grad_fn):
        # others' hooks have it, or PyTorch is too old to say
        if getattr(saved, "unpack_hook", saved) is not None:
            continue
        data = saved.data
        if type(data) is Tensor and data.dtype == x.dtype and data.untyped_storage().data_ptr() == memory:
            saved.register_hooks(lambda y: (y.size(), y.stride(), y.storage_offset()), make_view)


def _saved_since(begin, end) -> list:
    """Return the tensors that autograd functions between the nodes `begin` and `end` have saved for their backward."""
    nodes, todo = set(), [end]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes and node._sequence_nr() > begin._sequence_nr():
            nodes.add(node)
            todo += [before for before, _ in node.next_functions]
    return [saved for node in nodes for saved in getattr(node, "_raw_saved_tensors", ())]
