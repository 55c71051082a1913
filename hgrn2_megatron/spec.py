"""What `--spec` names: `hgrn2` for a GPT, `hgrn2_stack` for a HybridModel.

Importing this module installs the hooks that a model needs, on Megatron's blocks, models, generation, CUDA graphs,
checkpoints and distributed optimizer (see megatron_hooks.py). Where Megatron's training loop is already imported, it
also installs those on what the loop loads and reports.
"""

import sys

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from hgrn2_megatron import checkpoint_hooks, megatron_hooks
from hgrn2_megatron.config import UsageError


class HGRN2Placeholder(BaseTransformerLayer):
    """Stands for "the layers of an HGRN2 model" until a block resolves it; never built itself.

    A static spec is the one form every supported Megatron release takes, but it cannot know which of a hybrid's
    layers it will become. The hook on TransformerBlock puts the real layer specs in its place.
    """

    def __init__(self, *args, **kwargs):
        raise UsageError(
            "--spec hgrn2_megatron.spec hgrn2 is for a GPT (pretrain_gpt.py): "
            "give HybridModel --spec hgrn2_megatron.spec hgrn2_stack"
        )


hgrn2 = ModuleSpec(module=HGRN2Placeholder)

# named, not imported: releases without HybridModel have the GPT form all the same
hgrn2_stack = ModuleSpec(module=("hgrn2_megatron.stack", "HGRN2Stack"))

megatron_hooks.install_block(HGRN2Placeholder, hgrn2_stack)
megatron_hooks.install_loss()
megatron_hooks.install_generation()
megatron_hooks.install_graphs()
checkpoint_hooks.install_saving()
checkpoint_hooks.install_optimizer()
if "megatron.training.checkpointing" in sys.modules:
    checkpoint_hooks.install_checkpoint()
if "megatron.training.training" in sys.modules:
    megatron_hooks.install_reports()
