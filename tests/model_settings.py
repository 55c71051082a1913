"""Settings of small HGRN2 models, as the checks of Megatron's flags read them."""

import types

from hgrn2_megatron.settings import Settings


def gpt_settings(**changes) -> Settings:
    """Return the settings of a GPT of HGRN2 layers that nothing is wrong with, with changes."""
    base = dict(
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        add_bias_linear=False,
        swiglu=True,
        position_embedding_type="none",
        hidden_size=256,
        transformer_impl="local",
    )
    return Settings(types.SimpleNamespace(**base | changes))


def stack_settings(**changes) -> Settings:
    """Return the settings of a HybridModel with HGRN2 layers that nothing is wrong with, with changes."""
    return gpt_settings(**dict(hybrid_layer_pattern="M-M-*-", position_embedding_type="rope") | changes)
