"""Patches of GPTModel and HybridModel: the loss by chunks, and the heads of multi-token prediction.

The loss by chunks is for models whose config has `hgrn2_loss_chunk_size`. A model that is called with labels tells its
output layer to return PendingLogits (chunked_loss.py) in the place of logits. The functions of Megatron that read
logits for a loss take both.
"""

import inspect

from hgrn2_megatron.chunked_loss import BY_CHUNKS, LossLayer, PendingLogits
from hgrn2_megatron.patching import unknown_release, wrap
from hgrn2_megatron.settings import global_args


def install_gpt_model() -> None:
    """Wrap __init__, forward and build_schedule_plan of GPTModel, so that the model can compute its loss by chunks.

    A spec does not describe the output layer, which the model builds itself. An output_processor of the caller, which
    computes the losses in the place of the model, gets the output layer and calls it as it likes.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.models.gpt import GPTModel

    wrap(GPTModel, "__init__", ["self", "config", "transformer_layer_spec", "vocab_size"], _make_init)
    wrap(GPTModel, "forward", _FORWARD, _make_forward)
    # takes the place of forward where --overlap-moe-expert-parallel-comm interleaves two micro-batches
    wrap(GPTModel, "build_schedule_plan", _FORWARD, _make_forward)


def install_hybrid_model(stack_spec) -> None:
    """Wrap HybridModel.__init__ and HybridModel.forward.

    HybridModel gives its stack only the layers of its pipeline stage, and builds the heads of multi-token prediction
    beside the stack. After the patch the stack knows the whole pattern, and the heads read the stack's lower bounds.

    The loss by chunks needs the same patches as in a GPT. HybridModel.forward takes no output_processor.

    Args:
        stack_spec: spec of a HybridModel with HGRN2 layers. The layers and heads of other specs stay as they are.

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

        return _make_init(__init__)

    parameters = ["self", "config", "hybrid_stack_spec", "vocab_size", "max_sequence_length", "hybrid_layer_pattern"]
    wrap(HybridModel, "__init__", parameters, make_init)
    wrap(HybridModel, "forward", _FORWARD, _make_forward)


def install_loss() -> None:
    """Wrap the two functions that read logits in the forward of a model with labels, so that they take PendingLogits.

    They are the method that makes losses of logits, and the function that counts the right predictions of the heads of
    multi-token prediction. Megatron 0.18 does not count them.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer import multi_token_prediction

    def make_loss(compute_language_model_loss):
        def wrapped(self, labels, logits):
            if isinstance(logits, PendingLogits):
                return logits.losses(labels)
            return compute_language_model_loss(self, labels, logits)

        return wrapped

    def make_counts(compute_counts):
        def wrapped(mtp_logits, mtp_labels, loss_mask, output_layer, runtime_gather_output, tp_group=None):
            if not isinstance(mtp_logits, PendingLogits):
                return compute_counts(mtp_logits, mtp_labels, loss_mask, output_layer, runtime_gather_output, tp_group)

            def count(*chunk):
                return compute_counts(*chunk, output_layer, False, tp_group)

            return mtp_logits.sums(count, mtp_labels, loss_mask)

        return wrapped

    wrap(LanguageModule, "compute_language_model_loss", ["self", "labels", "logits"], make_loss)
    name = "_compute_mtp_acceptance_counts"
    if hasattr(multi_token_prediction, name):
        parameters = ["mtp_logits", "mtp_labels", "loss_mask", "output_layer", "runtime_gather_output", "tp_group"]
        wrap(multi_token_prediction, name, parameters, make_counts)


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


_FORWARD = ["self", "input_ids", "position_ids", "attention_mask", "decoder_input", "labels"]


def _has_loss_by_chunks(model) -> bool:
    return bool(getattr(model.config, "hgrn2_loss_chunk_size", None))


def _make_init(init):
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if _has_loss_by_chunks(self) and self.post_process:
            LossLayer.take_over(self.output_layer)

    return __init__


def _make_forward(forward):
    signature = inspect.signature(forward)
    if "runtime_gather_output" not in signature.parameters:
        module = inspect.getmodule(forward)
        raise unknown_release(module, f"{forward.__qualname__} has no parameter runtime_gather_output")

    def wrapped(self, *args, **kwargs):
        if not _has_loss_by_chunks(self):
            return forward(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        labels, processor = (given.arguments.get(name) for name in ("labels", "output_processor"))
        if labels is not None and processor is None:
            given.arguments["runtime_gather_output"] = BY_CHUNKS
        return forward(*given.args, **given.kwargs)

    return wrapped
