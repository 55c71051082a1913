"""The mixer's part in generation: a state of constant size a sequence, in the place of keys and values."""

import torch
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused, step_hgrn2


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
