"""Generation with HGRN2 layers.

Each sequence has a recurrent state of constant size per layer, in the place of keys and values.
"""

import dataclasses
import importlib.util
import os

import torch
from megatron.core.inference.config import MambaInferenceStateConfig
from megatron.core.inference.contexts.mamba_slot_allocator import MAX_INTERMEDIATE_OFFSETS_PER_REQUEST
from megatron.core.transformer import attention
from megatron.core.utils import is_fa_min_version
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused, shard_states, step_hgrn2
from hgrn2_megatron.config import DELTA_NET, LATENT_ATTENTION, HGRN2Config
from hgrn2_megatron.settings import megatron_release

STATES_DTYPE_HINT = (
    "leave ssm_states_dtype of MambaInferenceStateConfig.from_model out, or give "
    "--mamba-inference-ssm-states-dtype fp32"
)

# The prefix cache keeps states at multiples of this many tokens, and so takes blocks of such sizes. HGRN2 needs no
# multiple, but Megatron lists all of them in each step.
CACHED_EVERY = 16


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
        qfv: [1, t, H, 3, K] raw projections: first the new tokens of each request in decode, which are one and the
            speculative ones, then the prompts, or parts of prompts, of the requests in prefill, then padding.
        lower_bound: [H, K] fp32, or None.
        context: Megatron's DynamicInferenceContext. It keeps the states of each layer, [max_requests, H, K, K] fp32
            (fp64 with fp64 inputs), and zeros the state of a new request, or restores it from the prefix cache.
        layer_number: 1-based number of the layer in its pipeline stage.

    Returns:
        o: [1, t, H, K] dtype of qfv. Outputs of padding are 0, whatever its projections are, because quantization takes
            its scale over all rows. The context then holds the states after the last token. With speculative decoding
            it also holds the states after each new token of a request in decode, from which Megatron takes the one
            after the last accepted token. With prefix caching it also holds the states inside of prompts that Megatron
            wants to cache.

    Raises:
        ValueError: the context keeps no states, or states of another dtype.
    """
    states = _dynamic_states(context, layer_number, torch.promote_types(qfv.dtype, torch.float32))
    dimensions, metadata = context.padded_batch_dimensions, context.mamba_metadata
    num_decodes = dimensions.decode_req_count
    num_tokens = num_decodes * (1 + context.num_speculative_tokens)
    if num_decodes:
        new = qfv[0, :num_tokens].unflatten(0, (num_decodes, -1))
        after_each = None
        if context.num_speculative_tokens:
            after_each = context.mamba_states_cache(layer_number, intermediate=True)[1]
        decoded = _decode(new, lower_bound, states, metadata.batch_indices_decode, after_each).flatten(0, 1)[None]
        if not dimensions.prefill_req_count:
            return decoded
        # the tokens of requests in decode, without the padding of a CUDA graph
        start = metadata.device_decode_prefill[:1]
    else:
        start = metadata.cu_seqlens.new_zeros(1)
    # The tokens before the prompts are one more sequence.
    boundaries = torch.cat([start.new_zeros(1), metadata.cu_seqlens + start]).int()
    o, initial = _prefill(qfv, lower_bound, states, boundaries, metadata.batch_indices_prefill)
    cache = context.mamba_slot_allocator
    # A graph that is captured without a state to keep may be run with one.
    if cache is not None and (metadata.intermediate_count or context.using_cuda_graph_this_step()):
        positions = metadata.intermediate_abs_positions
        # Megatron pads the positions with the width of its convolution.
        is_padding = positions <= context.mamba_conv_states_shape[-1]
        positions = torch.where(is_padding, boundaries[-1], positions + start)
        inner = _states_inside(qfv, lower_bound, boundaries, initial, positions)
        cache.intermediate_ssm_out[context.layer_map[layer_number - 1]][: len(inner)] = inner
    if num_decodes:
        is_decode = torch.arange(num_tokens, device=o.device) < start
        o[:, :num_tokens] = torch.where(is_decode[:, None, None], decoded, o[:, :num_tokens])
    return o


def _dynamic_states(context, layer_number: int, dtype: torch.dtype) -> Tensor:
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


def _decode(qfv, lower_bound, states, slots, after_each):
    """Apply the operator to the new tokens of requests in decode, and advance their states in place.

    Args:
        qfv: [N, T, H, 3, K] raw projections of the T new tokens of each request.
        lower_bound: [H, K] fp32, or None.
        states: [max_requests, H, K, K], of which the rows `slots` are read and written.
        slots: [N], rows of `states` that belong to the requests; -1 for padding.
        after_each: [max_requests, T, H, K, K], of which the rows `slots` are written: the states after each token.
            None keeps only the last state.

    Returns:
        o: [N, T, H, K], 0 for padding.
    """
    q, f, v = qfv.unbind(-2)
    if after_each is None:
        return step_hgrn2(q, f, v, lower_bound, states, slots)
    # Padding writes the state of slot 0 to where slot 0 itself does.
    rows, outputs = slots.clamp(min=0).long(), []
    for t in range(qfv.shape[1]):
        q_t, f_t, v_t = (x[:, t : t + 1] for x in (q, f, v))
        outputs.append(step_hgrn2(q_t, f_t, v_t, lower_bound, states, slots))
        after_each[rows, t] = states[rows]
    return torch.cat(outputs, 1)


def _prefill(qfv, lower_bound, states, boundaries, slots):
    """Apply the operator to the prompts, and advance their states in place.

    Args:
        qfv: [1, t, H, 3, K] raw projections of all tokens of the step.
        lower_bound: [H, K] fp32, or None.
        states: [max_requests, H, K, K], of which the rows `slots` are read and written.
        boundaries: [N + 2] int32: 0, the start of the first prompt in t, and the end of each prompt.
        slots: [N], rows of `states` that belong to the prompts; -1 for an empty prompt that is padding.

    Returns:
        o: [1, t, H, K]. The outputs before the prompts have no meaning. Those behind the last prompt are 0.
        initial: [N + 1, H, K, K], the states before the sequences between the boundaries.
    """
    # Padding repeats the first prompt, so that a row which is written twice gets the same state both times.
    prompts = torch.arange(len(slots), device=slots.device)
    prompts = torch.where(slots >= 0, prompts, (slots >= 0).int().argmax())
    slots = slots[prompts].long()
    initial = torch.cat([torch.zeros_like(states[:1]), states[slots]])
    o, final = chunk_hgrn2_fused(
        qfv, lower_bound, initial_state=initial, output_final_state=True, cu_seqlens=boundaries
    )
    states[slots] = final[1:][prompts]
    return o, initial


def _states_inside(qfv, lower_bound, boundaries, initial, positions):
    """Return the states at some positions inside of prompts.

    The positions cut the prompts into pieces. A piece turns the state that enters it into the decay of the piece times
    this state, plus a state of its own. All pieces compute both at the same time.

    Args:
        qfv: [1, t, H, 3, K] raw projections of all tokens of the step.
        lower_bound: [H, K] fp32, or None.
        boundaries: [N + 2] int32, boundaries of the prompts, and 0.
        initial: [N + 1, H, K, K], the states before the sequences between the boundaries.
        positions: [P], in ascending order, at most MAX_INTERMEDIATE_OFFSETS_PER_REQUEST in one prompt, and none at its
            start or end. Padding is at the end of the last prompt.

    Returns:
        states: [P, H, K, K], the states after the tokens before each position. Those of padding have no meaning.
    """
    _, f, v = qfv.unbind(-2)
    cuts = torch.cat([boundaries, positions]).sort().values.int()
    added, log_decays = shard_states(f, v, lower_bound, cu_seqlens=cuts)
    # the piece that ends at each position, and the prompt around it
    pieces = torch.searchsorted(cuts, positions) - 1
    prompts = torch.searchsorted(boundaries, positions) - 1
    added, decays, entering = added[pieces], log_decays[pieces].exp()[..., None], initial[prompts]
    is_first = (cuts[pieces] == boundaries[prompts])[:, None, None, None]
    states = entering
    for _ in range(MAX_INTERMEDIATE_OFFSETS_PER_REQUEST):
        states = added + decays * torch.where(is_first, entering, states.roll(1, 0))
    return states


@dataclasses.dataclass
class HGRN2StateConfig(MambaInferenceStateConfig):
    """Description of a pipeline stage with HGRN2 layers for Megatron's DynamicInferenceContext.

    The context treats HGRN2 layers as Mamba layers.

    Attributes:
        has_attention: whether the stage also has attention layers.
        is_uneven: whether the pipeline stages have different numbers of HGRN2 layers.
        is_captured: whether Megatron captures the steps in CUDA graphs.
    """

    has_attention: bool = False
    is_uneven: bool = False
    is_captured: bool = False

    @classmethod
    def of_stack(cls, decoder, states_dtype: torch.dtype | None) -> "HGRN2StateConfig":
        """Describe the layers of a stack. All pipeline stages call this function.

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
            mamba_chunk_size=CACHED_EVERY,
            has_attention="*" in symbols,
            is_uneven=_differs(symbols.count("M"), decoder.pg_collection.pp),
            is_captured=config.cuda_graph_impl == "local",
        )

    def check(self, inference_config) -> None:
        """Raise an error for what would fail in a later step, or give wrong tokens.

        Megatron's static engine falls back to its legacy path if the dynamic context cannot be built, but not if its
        first step fails.

        Args:
            inference_config: Megatron's InferenceConfig.

        Raises:
            ValueError: the stage has attention layers, and flash-attn is not installed. Or speculative decoding is
                asked for on a CPU without Triton's interpreter. Or prefix caching is asked for where Megatron's
                release has no prefix cache that is right for recurrent layers, or where CUDA graphs capture the steps.
        """
        if self.has_attention and not _has_flash_attention():
            raise ValueError(
                "flash-attn 2.7.3 or later is not installed, and Megatron's dynamic engine needs it for the attention "
                "layers of a hybrid: install it, which takes a GPU, or build StaticInferenceEngine with legacy=True"
            )
        drafts = inference_config.num_speculative_tokens
        if drafts and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"num_speculative_tokens is {drafts}, but Megatron verifies such tokens in Triton kernels, which need "
                "a GPU: set it to 0 in Megatron's InferenceConfig, or set TRITON_INTERPRET=1 in the environment before "
                "the program starts"
            )
        if not inference_config.enable_prefix_caching:
            return
        if megatron_release() < (0, 19):
            raise ValueError(
                "enable_prefix_caching is True, but the prefix cache of Megatron before 0.19 keeps states of recurrent "
                "layers under the wrong tokens where a prompt comes in pieces: set enable_prefix_caching to False in "
                "Megatron's InferenceConfig, or install megatron-core 0.19"
            )
        if self.is_captured:
            raise ValueError(
                "enable_prefix_caching is True, but Megatron captures the steps in CUDA graphs, and a run with both "
                "failed on a GPU: set enable_prefix_caching to False in Megatron's InferenceConfig, or give "
                "--cuda-graph-impl none"
            )
        if megatron_release() < (0, 20) and self.is_uneven:
            raise ValueError(
                "enable_prefix_caching is True, but the pipeline stages have different numbers of HGRN2 layers, and "
                "before 0.20 Megatron gives such stages prefix caches of different sizes, which then skip different "
                "tokens: set enable_prefix_caching to False in Megatron's InferenceConfig, or choose stages with equal "
                "numbers of HGRN2 layers"
            )


def _differs(number: int, group: torch.distributed.ProcessGroup) -> bool:
    """Return whether the ranks of a group have different numbers."""
    numbers = [None] * group.size()
    torch.distributed.all_gather_object(numbers, number, group=group)
    return len(set(numbers)) > 1


def _has_flash_attention() -> bool:
    """Return whether Megatron's attention layers find the flash-attn that they need in the dynamic engine."""
    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return True
    return importlib.util.find_spec("flash_attn") is not None and is_fa_min_version("2.7.3")
