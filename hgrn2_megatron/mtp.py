"""The heads of multi-token prediction (MTP) in a HybridModel, such as /*- and /M- behind its layer pattern."""

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)

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

    def forward(self, *args, inference_params=None, **kwargs):
        """Compute the head as in training, without the caches of generation.

        Megatron skips heads while an engine generates, but not for a caller that gives the deprecated inference_params.
        The layers of a head have the numbers of layers of the stack, under which the stack keeps its states.
        """
        return super().forward(*args, **kwargs)
