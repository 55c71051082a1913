"""Patches of HybridModel: its stack knows the whole layer pattern, and its heads read the stack's lower bounds."""

import inspect

from hgrn2_megatron.patching import wrap
from hgrn2_megatron.settings import global_args


def install_hybrid_model(stack_spec) -> None:
    """Wrap HybridModel.__init__, so that the stack knows the whole pattern and the heads read the lower bounds.

    HybridModel gives the stack only the layers of its pipeline stage, and builds the heads of multi-token prediction
    beside the stack.

    Args:
        stack_spec: spec of a HybridModel with HGRN2 layers. Models with other specs stay as they are.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    def make_init(init):
        signature = inspect.signature(init)

        def __init__(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            if given["hybrid_stack_spec"] is not stack_spec:
                return init(self, *args, **kwargs)
            from hgrn2_megatron.block import share_bounds_with_heads

            if getattr(global_args(), "hybrid_layer_pattern", None) is None:
                given["config"].hybrid_layer_pattern = given.get("hybrid_layer_pattern")
            init(self, *args, **kwargs)
            if self.mtp_process:
                share_bounds_with_heads(self.decoder, self.mtp)
                if self.share_embeddings_and_output_weights:
                    # The stage of the heads has the embedding, and its output layer takes that weight. Megatron gives
                    # the output layer a weight of its own too if this is not the first stage. That weight would get no
                    # gradient, and Megatron could not save it.
                    self.output_layer.weight = None

        return __init__

    parameters = ["self", "config", "hybrid_stack_spec", "vocab_size", "max_sequence_length", "hybrid_layer_pattern"]
    wrap(HybridModel, "__init__", parameters, make_init)


def install_heads() -> None:
    """Wrap is_inference_column_parallel_linear, so that heads of multi-token prediction need no Transformer Engine.

    Megatron 0.20-dev calls it for each head. It compares the head's projection with two classes that derive from
    Transformer Engine's, and fails if Transformer Engine is not installed. No head has such a projection then. Earlier
    releases do not have this function.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import inference_layers

    name = "is_inference_column_parallel_linear"
    if hasattr(inference_layers, name) and not HAVE_TE:
        wrap(inference_layers, name, ["module"], lambda original: lambda module: False)
