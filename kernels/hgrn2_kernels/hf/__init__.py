"""HGRN2 models for Hugging Face transformers, in fla's format and computed by hgrn2_kernels.

This package needs torch, transformers and hgrn2_kernels. It imports neither Megatron nor fla.

    HGRN2Config, HGRN2Model, HGRN2ForCausalLM: the config, the model without its output layer, and the language model.
    register: makes AutoConfig, AutoModel and AutoModelForCausalLM build these classes.
"""

import hgrn2_kernels.hf.versions  # noqa: F401  checks the release before the others need it
from hgrn2_kernels.hf.configuration import HGRN2Config
from hgrn2_kernels.hf.modeling import HGRN2ForCausalLM, HGRN2Model
from hgrn2_kernels.hf.registration import register

__all__ = ["HGRN2Config", "HGRN2ForCausalLM", "HGRN2Model", "register"]
