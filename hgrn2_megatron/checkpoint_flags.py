"""Megatron's flags in which the run that loads a checkpoint must agree with the run that saved it."""

# Megatron's flag -> its attribute, for the flags that decide the shapes and the meaning of weights outside the mixers
BLOCK_FLAGS = {
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--disable-bias-linear": "add_bias_linear",
    "--swiglu": "swiglu",
    "--untie-embeddings-and-output-weights": "untie_embeddings_and_output_weights",
    "--multi-latent-attention": "multi_latent_attention",
    "--experimental-attention-variant": "experimental_attention_variant",
}
# Flag -> attribute, for positions: they change the function of attention layers and no shapes. Then the same for those
# of multi-latent attention alone.
ROTARY_FLAGS = {
    "--rotary-base": "rotary_base",
    "--rotary-percent": "rotary_percent",
    "--rotary-interleaved": "rotary_interleaved",
    "--rotary-seq-len-interpolation-factor": "rotary_seq_len_interpolation_factor",
}
LATENT_ROTARY_FLAGS = {
    "--rope-type": "rope_type",
    "--rotary-scaling-factor": "rotary_scaling_factor",
    "--mscale": "mscale",
    "--mscale-all-dim": "mscale_all_dim",
}
POSITION_FLAGS = ("--position-embedding-type", *ROTARY_FLAGS, *LATENT_ROTARY_FLAGS)
# Flag -> attribute, for the flags that decide the shapes and the meaning of the weights of attention layers.
ATTENTION_FLAGS = {
    "--num-attention-heads": "num_attention_heads",
    "--kv-channels": "kv_channels",
    "--add-qkv-bias": "add_qkv_bias",
    "--qk-layernorm": "qk_layernorm",
    "--qk-l2-norm": "qk_l2_norm",
} | ROTARY_FLAGS
# The same of multi-latent attention, in addition to those of all attention layers
LATENT_FLAGS = {
    "--q-lora-rank": "q_lora_rank",
    "--kv-lora-rank": "kv_lora_rank",
    "--qk-head-dim": "qk_head_dim",
    "--qk-pos-emb-head-dim": "qk_pos_emb_head_dim",
    "--v-head-dim": "v_head_dim",
} | LATENT_ROTARY_FLAGS
# Flag -> attribute, for the sizes on which the state of a distributed optimizer may depend
SIZE_FLAGS = {
    "--tensor-model-parallel-size": "tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "--num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
}
