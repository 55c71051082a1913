"""The mixer's part in generation: a state of constant size a sequence, in the place of keys and values."""

import dataclasses
import importlib.util

import torch
from megatron.core.inference.config import MambaInferenceStateConfig
from megatron.core.transformer import attention
from megatron.core.utils import is_fa_min_version
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused, step_hgrn2
from hgrn2_megatron.config import HGRN2Config

FP32 = "leave ssm_states_dtype of MambaInferenceStateConfig.from_model out, or --mamba-inference-ssm-states-dtype fp32"


def advance(qfv: Tensor, lower_bound: Tensor | None, context, layer_number: int) -> Tensor:
    """The operator over the next tokens of sequences that Megatron's static engine generates.

    Args:
        qfv: [b, s, H, 3, K] of the tokens at the context's offset: a prompt at offset 0, then mostly one token.
        lower_bound: [H, K] fp32.
        context: Megatron's StaticInferenceContext. Its cache gets, under the layer's number, the states of all its
            sequences, [1, max_batch_size, H, K, K] fp32 (fp64 with fp64 inputs), and an empty tensor: a pair with the
            sequences in its second dimension, as keys and values are, which is what Megatron reorders.
        layer_number: of the layer, unique in the model.

    Returns:
        o: [b, s, H, K] dtype of qfv. The states are those after the last token.
    """
    b, s, H, _, K = qfv.shape
    cache = context.key_value_memory_dict
    if layer_number not in cache:
        dtype = torch.promote_types(qfv.dtype, torch.float32)
        # the next batch may come without torch.inference_mode, where a tensor of that could not be written
        with torch.inference_mode(False):
            states = qfv.new_zeros((1, context.max_batch_size, H, K, K), dtype=dtype)
        cache[layer_number] = states, states.new_zeros((1, context.max_batch_size, 0))
    first = context.batch_size_offset
    states = cache[layer_number][0][0, first : first + b]
    if context.sequence_len_offset == 0:
        # of the batch before
        states.zero_()
    if s == 1:
        q, f, v = qfv.unbind(-2)
        return step_hgrn2(q, f, v, lower_bound, states)
    o, final_states = chunk_hgrn2_fused(qfv, lower_bound, initial_state=states, output_final_state=True)
    states.copy_(final_states)
    return o


def advance_dynamic(qfv: Tensor, lower_bound: Tensor | None, context, layer_number: int) -> Tensor:
    """The operator over one step of Megatron's dynamic batching, in which requests come and go.

    Nothing here waits for the device or hangs on values in it, so that a step can be captured in a CUDA graph.

    Args:
        qfv: [1, t, H, 3, K], one new token of each request that decodes, then the prompts, or parts of them, of those
            that do not yet, then padding.
        lower_bound: [H, K] fp32.
        context: Megatron's DynamicInferenceContext, which keeps the states, [max_requests, H, K, K] fp32 (fp64 with
            fp64 inputs) a layer, and empties those of a new request.
        layer_number: of the layer, 1-based in its pipeline stage.

    Returns:
        o: [1, t, H, K] dtype of qfv; that of padding means nothing. The states are those after the last token.

    Raises:
        ValueError: a context without such states, or one that wants more of them than HGRN2 layers do.
    """
    states = _dynamic_states(context, layer_number, torch.promote_types(qfv.dtype, torch.float32))
    dimensions, metadata = context.padded_batch_dimensions, context.mamba_metadata
    num_decodes = dimensions.decode_req_count
    if num_decodes:
        q, f, v = qfv[0, :num_decodes, None].unbind(-2)
        decoded = step_hgrn2(q, f, v, lower_bound, states, metadata.batch_indices_decode).transpose(0, 1)
        if not dimensions.prefill_req_count:
            return decoded
        # of the requests that decode, without the padding of a CUDA graph
        start = metadata.device_decode_prefill[:1]
    else:
        start = metadata.cu_seqlens.new_zeros(1)
    o = _prefill(qfv, lower_bound, states, start, metadata.cu_seqlens, metadata.batch_indices_prefill)
    if num_decodes:
        is_decode = torch.arange(num_decodes, device=o.device) < start
        o[:, :num_decodes] = torch.where(is_decode[:, None, None], decoded, o[:, :num_decodes])
    return o


def _dynamic_states(context, layer_number: int, dtype: torch.dtype) -> Tensor:
    if context.num_speculative_tokens or context.enable_prefix_caching:
        raise ValueError(
            "HGRN2 layers generate without speculative decoding and prefix caching, which need the states of earlier "
            "tokens: set num_speculative_tokens to 0 and enable_prefix_caching to False in Megatron's InferenceConfig"
        )
    if not context.is_hybrid_model:
        raise ValueError(
            "this DynamicInferenceContext keeps no states: give its InferenceConfig "
            "mamba_inference_state_config=MambaInferenceStateConfig.from_model(model)"
        )
    states = context.mamba_states_cache(layer_number)[1]
    if states.dtype != dtype:
        raise ValueError(f"the states of this DynamicInferenceContext are {states.dtype}, HGRN2 needs {dtype}: {FP32}")
    return states


def _prefill(qfv, lower_bound, states, start, cu_seqlens, slots):
    """The operator over the prompts [1, t, H, 3, K] of which the first begins at `start` [1], from states to states.

    Args:
        cu_seqlens: [N + 1], borders of the prompts, from 0.
        slots: [N], the rows of `states` that belong to them; -1 for an empty one that pads.
    """
    # what stands before and behind the prompts are two sequences more
    begin, end = start.new_zeros(1), start.new_full((1,), qfv.shape[1])
    borders = torch.cat([begin, cu_seqlens + start, end])
    # padding repeats the first prompt, so that no row is written twice with different states
    own = torch.arange(len(slots), device=slots.device)
    own = torch.where(slots >= 0, own, (slots >= 0).int().argmax())
    slots = slots[own].long()
    initial = states.new_zeros((len(slots) + 2, *states.shape[1:]))
    initial[1:-1] = states[slots]
    o, final = chunk_hgrn2_fused(
        qfv, lower_bound, initial_state=initial, output_final_state=True, cu_seqlens=borders.int()
    )
    states[slots] = final[1:-1][own]
    return o


@dataclasses.dataclass
class HGRN2StateConfig(MambaInferenceStateConfig):
    """What a DynamicInferenceContext must know of a stage with HGRN2 layers: it takes them for Mamba's.

    Attributes:
        has_attention: whether the stage has attention layers too.
    """

    has_attention: bool = False

    @classmethod
    def of_stack(cls, decoder, states_dtype: torch.dtype | None) -> "HGRN2StateConfig":
        """Describe the layers of a stack.

        Args:
            decoder: Megatron's TransformerBlock or HybridStack of this pipeline stage.
            states_dtype: of the states, None for the right one.

        Raises:
            ValueError: states of another dtype.
        """
        config = decoder.config
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        if states_dtype not in (None, dtype):
            raise ValueError(f"states of {states_dtype} lose what HGRN2 layers add to them, {dtype} does not: {FP32}")
        symbols = getattr(decoder, "layer_type_list", None) or [
            "M" if hasattr(layer.self_attention, "use_lower_bounds") else "*" for layer in decoder.layers
        ]
        hgrn2 = HGRN2Config.of(config)
        K = hgrn2.expand_ratio
        return cls(
            # Megatron has no context for a stage that lacks one kind: a name of it, without a layer
            layer_type_list=[*symbols, *sorted({"M", "*"}.difference(symbols))],
            # HGRN2 has no convolution, Megatron no context without one
            conv_states_shape=(1, 1),
            ssm_states_shape=(hgrn2.num_heads(config.hidden_size) // decoder.pg_collection.tp.size(), K, K),
            conv_states_dtype=config.params_dtype,
            ssm_states_dtype=dtype,
            has_attention="*" in symbols,
        )

    def check(self) -> None:
        """Refuse what would fail in the first step, while Megatron's static engine can still go on without this one.

        Raises:
            ValueError: attention layers where Megatron finds no flash-attn.
        """
        if self.has_attention and not _has_flash_attention():
            raise ValueError(
                "Megatron's dynamic batching needs flash-attn 2.7.3 for the attention layers of a hybrid: install it, "
                "which takes a GPU, or give the StaticInferenceEngine legacy=True"
            )


def _has_flash_attention() -> bool:
    """What Megatron's attention asserts under dynamic batching."""
    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return True
    return importlib.util.find_spec("flash_attn") is not None and is_fa_min_version("2.7.3")
