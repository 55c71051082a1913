"""Conversion between fla's HGRN2 models on Hugging Face and Megatron checkpoints."""
