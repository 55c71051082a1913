"""The heads of multi-token prediction (MTP) in a HybridModel, such as /*- and /M- behind its layer pattern."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from torch import Tensor

from hgrn2_megatron.layer import backend, final_norm
from hgrn2_megatron.stack import stack_submodules


class HGRN2Head(MultiTokenPredictionLayer):
    """One head of multi-token prediction, whose layers are those of HGRN2Stack.

    The head for depth k joins the normed hidden state of a token with the normed embedding of the token k places
    further, projects both to the hidden size, applies its own layers and a final norm, and predicts the token after
    that with the model's output layer. Megatron's own spec of a head needs Transformer Engine. This one takes norms and
    projection as the config's `transformer_impl` says.

    Args:
        config: Megatron's TransformerConfig, already checked by HGRN2Stack.
        hybrid_submodules: ignored, because the layers depend on the config.
        rest: further arguments of MultiTokenPredictionLayer.

    Source: arXiv 2404.19737 and arXiv 2412.19437, section 2.2.
    """

    def __init__(self, config: TransformerConfig, hybrid_submodules=None, **rest):
        norm = final_norm(config)
        submodules = MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=backend(config).column_parallel_linear()
        )
        super().__init__(config, submodules=submodules, hybrid_submodules=stack_submodules(config), **rest)
        for module in self.modules():
            if isinstance(module, Router):
                # Routers log their losses by layer, and Megatron has one place for each head. Releases before 0.20 do
                # not tell a router that it is in a head. Later ones do, but number it within the head.
                module.is_mtp_layer = True
                module.set_layer_number(self.layer_number)

    def forward_single_position(self, hidden_states: Tensor, next_token_ids: Tensor, **kwargs) -> Tensor:
        """Compute the head for one position of each request, as speculative decoding does.

        Megatron passes the requests as one sequence. HGRN2 layers take each as a sequence of its own, so that no
        request reads another. Other mixers do not support this everywhere, so a head with one of them gets Megatron's
        one sequence.

        Args:
            hidden_states: [n, 1, h], or [n/tp, 1, h] under sequence parallelism: the last hidden state of each request.
            next_token_ids: [1, n] int64, the token after it.
            kwargs: further arguments of MultiTokenPredictionLayer.

        Returns:
            hidden: shape and dtype of hidden_states.
        """
        if set(self.mtp_layer_pattern) <= set("M-E"):
            boundaries = torch.arange(next_token_ids.shape[1] + 1, dtype=torch.int32, device=next_token_ids.device)
            kwargs["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries
            )
        return super().forward_single_position(hidden_states, next_token_ids, **kwargs)

    def forward(self, *args, inference_params=None, **kwargs):
        """Compute the head as in training, without the caches of generation.

        Megatron skips heads while an engine generates, but not for a caller that gives the deprecated inference_params.
        The layers of a head have the numbers of layers of the stack, under which the stack keeps its states.
        """
        return super().forward(*args, **kwargs)
