"""The two specs that `--spec` names: `hgrn2` for a GPT, `hgrn2_stack` for a HybridModel.

Importing this module patches Megatron with the functions of megatron_hooks.py, model_hooks.py and checkpoint_hooks.py.
It always patches:
- TransformerBlock and the function that reads its spec, so that the layers become HGRN2 layers;
- GPTModel and HybridModel, and the functions that read their logits, so that losses can be computed by chunks;
- HybridModel also so that its stack knows the whole pattern and its heads read the lower bounds;
- MambaInferenceStateConfig and DynamicInferenceContext, so that the dynamic engine keeps HGRN2's states;
- StaticBufferLoader, so that CUDA graphs of the iteration keep their buffers;
- the function that divides a checkpoint's tensors among the ranks that save or load it;
- ChunkOffloadHandler, so that an offloaded activation is complete when the backward reads it;
- DistributedOptimizer, so that Megatron-FSDP can save the states of PyTorch's Adam, and for another fix before
  megatron-core 0.20.

Where `megatron.training.checkpointing` is already imported, it patches the two functions that read a checkpoint. Where
`megatron.training.training` is already imported, it patches the reports of floating-point operations and of memory.
"""

import sys
import types

from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from hgrn2_megatron import checkpoint_hooks, fsdp, megatron_hooks, model_hooks, offloading
from hgrn2_megatron.config import UsageError


class HGRN2Placeholder(BaseTransformerLayer):
    """Placeholder for the layers of an HGRN2 model. It is never built.

    Every supported Megatron release accepts a static spec, but a static spec cannot know which layer of a hybrid it is
    for. The hook on TransformerBlock replaces the placeholder with the real spec of each layer.

    Raises:
        UsageError: Megatron builds the placeholder, which happens if a HybridModel gets the spec of a GPT.
    """

    def __init__(self, *args, **kwargs):
        raise UsageError(
            "--spec hgrn2_megatron.spec hgrn2 is for a GPT (pretrain_gpt.py), but this is a HybridModel: "
            "give HybridModel --spec hgrn2_megatron.spec hgrn2_stack"
        )


hgrn2 = ModuleSpec(module=HGRN2Placeholder)

# The spec names its modules instead of importing them, so that a GPT does not load them.
hgrn2_stack = ModuleSpec(
    module=("hgrn2_megatron.stack", "HGRN2Stack"),
    # Megatron reads only the heads from here. The layers depend on the config, so HGRN2Stack and HGRN2Head make them.
    submodules=types.SimpleNamespace(
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules([ModuleSpec(module=("hgrn2_megatron.mtp", "HGRN2Head"))]),
        )
    ),
)

megatron_hooks.install_layers(HGRN2Placeholder, hgrn2_stack)
model_hooks.install_gpt_model()
model_hooks.install_hybrid_model(hgrn2_stack)
model_hooks.install_loss()
model_hooks.install_heads()
megatron_hooks.install_generation()
megatron_hooks.install_graphs()
checkpoint_hooks.install_saving()
checkpoint_hooks.install_optimizer()
fsdp.install_optimizer()
offloading.install_reload()
if "megatron.training.checkpointing" in sys.modules:
    checkpoint_hooks.install_checkpoint()
if "megatron.training.training" in sys.modules:
    megatron_hooks.install_reports()
