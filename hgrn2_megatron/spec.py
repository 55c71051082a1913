"""`--spec hgrn2_megatron.spec hgrn2`: the object Megatron imports. Importing this module hooks TransformerBlock."""

import sys

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from hgrn2_megatron import megatron_hooks


class HGRN2Layer(BaseTransformerLayer):
    """Stands for "the layers of an HGRN2 model" until a block resolves it; never built itself.

    A static spec is the one form every supported Megatron release takes, but it cannot know which of a hybrid's
    layers it will become. The hook on TransformerBlock puts the real layer specs in its place.
    """

    def __init__(self, *args, **kwargs):
        raise RuntimeError("HGRN2Layer is a placeholder: the hook on TransformerBlock was not installed")


hgrn2 = ModuleSpec(module=HGRN2Layer)

megatron_hooks.install_block(HGRN2Layer)
if "megatron.training.checkpointing" in sys.modules:
    megatron_hooks.install_checkpoint()
