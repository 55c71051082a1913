"""Generation with HGRN2 layers.

Each sequence has a recurrent state of constant size per layer, in the place of keys and values.
"""

import dataclasses
import importlib.util

import torch
from megatron.core.inference.config import MambaInferenceStateConfig
from megatron.core.transformer import attention
from megatron.core.utils import is_fa_min_version
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused, step_hgrn2
from hgrn2_megatron.config import DELTA_NET, LATENT_ATTENTION, HGRN2Config

STATES_DTYPE_HINT = (
    "leave ssm_states_dtype of MambaInferenceStateConfig.from_model out, or give "
    "--mamba-inference-ssm-states-dtype fp32"
)


def advance(qfv: Tensor, lower_bound: Tensor | None, context, layer_number: int) -> Tensor:
    """Apply the operator to the next tokens of sequences in Megatron's static engine, and advance their states.

    Args:
        qfv: [b, s, H, 3, K] raw projections of the tokens at the context's offset. These are a prompt at offset 0, and
            usually one token per sequence later.
        lower_bound: [H, K] fp32, or None.
        context: Megatron's StaticInferenceContext. Its cache gets a pair of tensors under the layer's number: the
            states of all its sequences, [1, max_batch_size, H, K, K] fp32 (fp64 with fp64 inputs), and an empty tensor.
            Like keys and values, both have the sequences in the second dimension, in which Megatron reorders them.
        layer_number: number of the layer, unique in the model.

    Returns:
        o: [b, s, H, K] dtype of qfv. The cache then holds the states after the last token.
    """
    b, s, H, _, K = qfv.shape
    cache = context.key_value_memory_dict
    if layer_number not in cache:
        dtype = torch.promote_types(qfv.dtype, torch.float32)
        # The next batch may come without torch.inference_mode, and could not write into an inference tensor.
        with torch.inference_mode(False):
            states = qfv.new_zeros((1, context.max_batch_size, H, K, K), dtype=dtype)
        cache[layer_number] = states, states.new_zeros((1, context.max_batch_size, 0))
    first = context.batch_size_offset
    states = cache[layer_number][0][0, first : first + b]
    if context.sequence_len_offset == 0:
        # The cache still has the states of the previous batch.
        states.zero_()
    if s == 1:
        q, f, v = qfv.unbind(-2)
        return step_hgrn2(q, f, v, lower_bound, states)
    o, final_states = chunk_hgrn2_fused(qfv, lower_bound, initial_state=states, output_final_state=True)
    states.copy_(final_states)
    return o


def advance_dynamic(qfv: Tensor, lower_bound: Tensor | None, context, layer_number: int) -> Tensor:
    """Apply the operator to one step of Megatron's dynamic engine, and advance the states of its requests.

    This function never waits for the device and never branches on values in its memory, so that a step can be captured
    in a CUDA graph.

    Args:
        qfv: [1, t, H, 3, K] raw projections: first one new token of each request in decode, then the prompts, or parts
            of prompts, of the requests in prefill, then padding.
        lower_bound: [H, K] fp32, or None.
        context: Megatron's DynamicInferenceContext. It keeps the states of each layer, [max_requests, H, K, K] fp32
            (fp64 with fp64 inputs), and zeros the state of a new request.
        layer_number: 1-based number of the layer in its pipeline stage.

    Returns:
        o: [1, t, H, K] dtype of qfv. The context then holds the states after the last token. Outputs of padding have no
            meaning, but are 0 if the projections of padding are 0. A model with quantization scales needs this, and
            Megatron sets the embeddings of padding to 0 there. So the mixer need not zero its outputs as Megatron's
            SSMDynamicInferenceMixin does.

    Raises:
        ValueError: the context keeps no states, or states of another dtype, or uses speculative decoding or prefix
            caching.
    """
    states = _dynamic_states(context, layer_number, torch.promote_types(qfv.dtype, torch.float32))
    dimensions, metadata = context.padded_batch_dimensions, context.mamba_metadata
    num_decodes = dimensions.decode_req_count
    if num_decodes:
        q, f, v = qfv[0, :num_decodes, None].unbind(-2)
        decoded = step_hgrn2(q, f, v, lower_bound, states, metadata.batch_indices_decode).transpose(0, 1)
        if not dimensions.prefill_req_count:
            return decoded
        # the number of requests in decode, without the padding of a CUDA graph
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
            f"num_speculative_tokens is {context.num_speculative_tokens} and enable_prefix_caching is "
            f"{context.enable_prefix_caching}: both features need the states of earlier tokens, which HGRN2 layers do "
            "not keep. Set num_speculative_tokens to 0 and enable_prefix_caching to False in Megatron's InferenceConfig"
        )
    if not context.is_hybrid_model:
        raise ValueError(
            "this DynamicInferenceContext keeps no states for HGRN2 layers: give its InferenceConfig "
            "mamba_inference_state_config=MambaInferenceStateConfig.from_model(model)"
        )
    states = context.mamba_states_cache(layer_number)[1]
    if states.dtype != dtype:
        raise ValueError(
            f"this DynamicInferenceContext keeps states of {states.dtype}, and HGRN2 layers need {dtype}: "
            f"{STATES_DTYPE_HINT}"
        )
    return states


def _prefill(qfv, lower_bound, states, start, cu_seqlens, slots):
    """Apply the operator to the prompts, and advance their states in place.

    Args:
        qfv: [1, t, H, 3, K] raw projections of all tokens of the step.
        lower_bound: [H, K] fp32, or None.
        states: [max_requests, H, K, K], of which the rows `slots` are read and written.
        start: [1], position of the first prompt in t.
        cu_seqlens: [N + 1], boundaries of the prompts, counted from the first prompt.
        slots: [N], rows of `states` that belong to the prompts; -1 for an empty prompt that is padding.

    Returns:
        o: [1, t, H, K], of which only the outputs of the prompts have a meaning.
    """
    # The tokens before and after the prompts are two more sequences.
    begin, end = start.new_zeros(1), start.new_full((1,), qfv.shape[1])
    boundaries = torch.cat([begin, cu_seqlens + start, end])
    # Padding repeats the first prompt, so that a row which is written twice gets the same state both times.
    prompts = torch.arange(len(slots), device=slots.device)
    prompts = torch.where(slots >= 0, prompts, (slots >= 0).int().argmax())
    slots = slots[prompts].long()
    initial = states.new_zeros((len(slots) + 2, *states.shape[1:]))
    initial[1:-1] = states[slots]
    o, final = chunk_hgrn2_fused(
        qfv, lower_bound, initial_state=initial, output_final_state=True, cu_seqlens=boundaries.int()
    )
    states[slots] = final[1:-1][prompts]
    return o


@dataclasses.dataclass
class HGRN2StateConfig(MambaInferenceStateConfig):
    """Description of a pipeline stage with HGRN2 layers for Megatron's DynamicInferenceContext.

    The context treats HGRN2 layers as Mamba layers.

    Attributes:
        has_attention: whether the stage also has attention layers.
    """

    has_attention: bool = False

    @classmethod
    def of_stack(cls, decoder, states_dtype: torch.dtype | None) -> "HGRN2StateConfig":
        """Describe the layers of a stack.

        Args:
            decoder: Megatron's TransformerBlock or HybridStack of this pipeline stage.
            states_dtype: dtype of the states; None takes fp32, or fp64 for an fp64 model.

        Raises:
            ValueError: `states_dtype` is another dtype, or the stack has layers whose states or keys Megatron's dynamic
                engine cannot keep beside HGRN2's.
        """
        others = {LATENT_ATTENTION, DELTA_NET} & set(getattr(decoder, "layer_type_list", ""))
        if others:
            raise ValueError(
                f"Megatron's dynamic engine cannot generate with {' and '.join(sorted(others))} in "
                "--hybrid-layer-pattern beside HGRN2 layers: build StaticInferenceEngine with legacy=True"
            )
        config = decoder.config
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        if states_dtype not in (None, dtype):
            raise ValueError(
                f"ssm_states_dtype is {states_dtype}, in which the states of HGRN2 layers would lose small updates. It "
                f"must be {dtype}: {STATES_DTYPE_HINT}"
            )
        symbols = getattr(decoder, "layer_type_list", None) or [
            "M" if hasattr(layer.self_attention, "use_lower_bounds") else "*" for layer in decoder.layers
        ]
        hgrn2 = HGRN2Config.of(config)
        K = hgrn2.expand_ratio
        return cls(
            # Megatron's context needs a layer of each kind. A symbol at the end stands for a kind that is missing.
            layer_type_list=[*symbols, *sorted({"M", "*"}.difference(symbols))],
            # HGRN2 has no convolution, but Megatron's context needs a shape for its states.
            conv_states_shape=(1, 1),
            ssm_states_shape=(hgrn2.num_heads(config.hidden_size) // decoder.pg_collection.tp.size(), K, K),
            conv_states_dtype=config.params_dtype,
            ssm_states_dtype=dtype,
            has_attention="*" in symbols,
        )

    def check(self) -> None:
        """Raise an error if the first step would fail.

        Megatron's static engine falls back to its legacy path if the dynamic context cannot be built, but not if its
        first step fails.

        Raises:
            ValueError: the stage has attention layers, and flash-attn is not installed.
        """
        if self.has_attention and not _has_flash_attention():
            raise ValueError(
                "flash-attn 2.7.3 or later is not installed, and Megatron's dynamic engine needs it for the attention "
                "layers of a hybrid: install it, which takes a GPU, or build StaticInferenceEngine with legacy=True"
            )


def _has_flash_attention() -> bool:
    """Return whether Megatron's attention layers find the flash-attn that they need in the dynamic engine."""
    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return True
    return importlib.util.find_spec("flash_attn") is not None and is_fa_min_version("2.7.3")
