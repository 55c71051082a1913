"""The rules of every model and those of a GPT: refusals that name their flag, and warnings."""

import pytest
import torch.nn.functional as F
from model_settings import gpt_settings

from hgrn2_megatron import UsageError, offloading
from hgrn2_megatron.requirements import NOT_WITH_CHUNKED_LOSS, UNSUPPORTED, UNSUPPORTED_IN_GPT, check


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sft": True, "micro_batch_size": 2},
        {"sft": True, "pipeline_model_parallel_size": 4, "micro_batch_size": 1},
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2, "micro_batch_size": 1},
        {"context_parallel_size": 2},
        {"context_parallel_size": 2, "sft": True},
        {"context_parallel_size": 2, "dataloader_inter_document_masking": True},
        {"context_parallel_size": 2, "hybrid_context_parallel": True, "calculate_per_token_loss": True},
        {"perform_initialization": False, "train_iters": 8, "load": "checkpoints"},
        {"fp32_residual_connection": True},
        {"load": "saved", "ckpt_step": 2, "ckpt_format": "torch_dist", "use_distributed_optimizer": True},
    ],
    ids=str,
)
def test_these_pass_without_a_warning(changes):
    assert check(gpt_settings(**changes)) == []


REFUSED = [
    ({"normalization": "LayerNorm"}, "--normalization"),
    ({"add_bias_linear": True}, "--disable-bias-linear"),
    ({"add_qkv_bias": True}, "--add-qkv-bias"),
    ({"swiglu": False}, "--swiglu"),
    ({"quick_geglu": True}, "--quick-geglu"),
    ({"gated_linear_unit": True, "activation_func": F.gelu}, "--swiglu"),
    ({"glu_linear_offset": 1.0}, "--glu-linear-offset .* drop both"),
    ({"activation_func_clamp_value": 0.0}, "--activation-func-clamp-value"),
    ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type"),
    ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
    ({"apply_residual_connection_post_layernorm": True}, "--apply-residual"),
    ({"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size 4"),
    ({"hidden_size": 200}, "--hidden-size"),
    ({"context_parallel_size": 2, "hgrn2_layer_pattern": "HH*"}, "--context-parallel-size .* transformer_engine"),
    (
        {
            "context_parallel_size": 2,
            "hgrn2_layer_pattern": "HH*",
            "dataloader_inter_document_masking": True,
            "transformer_impl": "transformer_engine_in_a_test",
        },
        "--dataloader-inter-document-masking with --context-parallel-size",
    ),
    ({"multi_latent_attention": True}, r"--multi-latent-attention in a GPT .* pretrain_hybrid.py with \+ in "),
    (
        {"num_layers": 3, "hgrn2_layer_pattern": "***H"},
        "--hgrn2-layer-pattern is .*but no H falls on one of the 3 layers",
    ),
    (
        {"sft": True, "pipeline_model_parallel_size": 2, "micro_batch_size": 1, "eval_micro_batch_size": 2},
        "--sft .* give --eval-micro-batch-size 1",
    ),
    ({"mtp_num_layers": 1}, "--mtp-num-layers in a GPT .* run pretrain_hybrid.py with --spec hgrn2_stack"),
    ({"mtp_hybrid_override_pattern": "M-"}, "--mtp-hybrid-override-pattern"),
    ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant"),
    ({"heterogeneous_layers_config_path": "x.json"}, "--heterogeneous-layers-config-path"),
    ({"heterogeneous_layers_config_encoded_json": "{}"}, "--heterogeneous-layers-config-encoded-json"),
    ({"enable_mhc_connections": True}, "--enable-mhc-connections"),
    ({"hybrid_layer_pattern": "M*"}, "--hybrid-layer-pattern"),
    ({"transformer_impl": "inference_optimized"}, "--transformer-impl"),
    ({"cuda_graph_impl": "transformer_engine"}, "--cuda-graph-impl transformer_engine .* local or full_iteration"),
    ({"external_cuda_graph": True}, "--cuda-graph-impl"),
    ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 .* give --use-megatron-fsdp"),
    ({"sft": True, "hgrn2_layer_pattern": "HH*"}, "--sft packs sequences, which Megatron's own attention"),
    (
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2, "micro_batch_size": 2},
        "--dataloader-inter-document-masking .* give --micro-batch-size 1",
    ),
    *(
        (
            {"dataloader_inter_document_masking": True, "micro_batch_size": 1} | pipeline,
            "--dataloader-inter-document-masking .* give --pipeline-model-parallel-size 2 without virtual stages",
        )
        for pipeline in (
            {"pipeline_model_parallel_size": 4},
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        )
    ),
    (
        {"hybrid_context_parallel": True, "train_iters": 8},
        "--hybrid-context-parallel in Megatron's own .* give --context-parallel-size",
    ),
    ({"fp32_residual_connection": True, "bf16": True}, "--fp32-residual-connection with --bf16"),
    ({"init_model_with_meta_device": True, "train_iters": 8}, "--init-model-with-meta-device .* without --load"),
    ({"perform_initialization": False, "train_samples": 8}, "--no-initialization, without --load"),
    (
        {"load": "saved", "ckpt_step": 2, "ckpt_format": "torch", "use_distributed_optimizer": True},
        "--ckpt-step with --ckpt-format torch and --use-distributed-optimizer .* latest_checkpointed_iteration.txt",
    ),
    ({"freeze_all_layers": True}, "--freeze-all-layers on megatron-core 0.19 .* give --lr 0"),
    ({"tensor_parallel_num_weight_shards": 2}, "--tensor-parallel-num-weight-shards .* give --use-distributed"),
    (
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_num_weight_shards": 4},
        "--expert-tensor-parallel-num-weight-shards",
    ),
    ({"reset_attention_mask": True}, "--reset-attention-mask"),
    ({"reset_position_ids": True}, "--reset-position-ids"),
    (
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", "gdp_qkv"]},
        "--offload-modules gdp_qkv",
    ),
    (
        {"fine_grained_activation_offloading": True, "recompute_granularity": "full"},
        "--fine-grained-activation-offloading with .* selective",
    ),
    (
        {"overlap_moe_expert_parallel_comm": True, "num_layers": 3, "moe_layer_freq": [1, 1, 0]},
        "--overlap-moe-expert-parallel-comm with a last layer that has no experts",
    ),
    ({"batch_invariant_mode": True}, "--batch-invariant-mode"),
]


@pytest.mark.parametrize(("changes", "flag"), REFUSED)
def test_what_cannot_train_hgrn2_is_refused_by_flag(changes, flag):
    with pytest.raises(UsageError, match=flag):
        check(gpt_settings(**changes))


def test_every_unsupported_flag_is_in_the_table_above():
    tried = [gpt_settings(**changes) for changes, _ in REFUSED]
    for asked, flag, _ in UNSUPPORTED + offloading.UNSUPPORTED + UNSUPPORTED_IN_GPT:
        assert any(asked(settings) for settings in tried), flag


@pytest.mark.parametrize("pattern", ["H+", "HG"])
def test_a_gpt_has_no_layers_that_only_a_hybrid_model_has(pattern):
    with pytest.raises(UsageError, match="--hgrn2-layer-pattern .* only a HybridModel can have"):
        check(gpt_settings(hgrn2_layer_pattern=pattern))


def test_biases_of_a_hybrids_attention_are_the_users_choice():
    check(gpt_settings(add_qkv_bias=True, hgrn2_layer_pattern="H*", position_embedding_type="rope"))


CHUNKED_LOSS_CLASHES = [
    ({"cross_entropy_loss_fusion": True}, "--cross-entropy-loss-fusion"),
    ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute"),
    ({"fp8_output_proj": True}, "--fp8-output-proj"),
    ({"logit_dtype": "fp32"}, "--output-logit-dtype"),
    ({"config_logger_dir": "logs"}, "--config-logger-dir, which writes the logits of a GPT"),
]


@pytest.mark.parametrize(("changes", "flag"), CHUNKED_LOSS_CLASHES)
def test_what_the_loss_by_chunks_does_not_go_with_is_refused_by_flag(changes, flag):
    check(gpt_settings(**changes))
    check(gpt_settings(hgrn2_loss_chunk_size=8192))
    with pytest.raises(UsageError, match=f"--hgrn2-loss-chunk-size cannot be used with {flag}: "):
        check(gpt_settings(hgrn2_loss_chunk_size=8192, **changes))


def test_every_clash_with_the_loss_by_chunks_is_in_the_table_above():
    assert [flag for _, flag, _ in NOT_WITH_CHUNKED_LOSS] == [flag for _, flag in CHUNKED_LOSS_CLASHES]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"layernorm_epsilon": 1e-5}, "--norm-epsilon"),
        ({"hgrn2_norm_eps": 1e-6}, "--hgrn2-norm-eps"),
        (
            {"hgrn2_layer_pattern": "HHH*", "num_layers": 2, "position_embedding_type": "rope"},
            "no * falls on one of the 2 layers",
        ),
    ],
)
def test_what_trains_but_departs_from_published_models_warns(changes, flag):
    assert [flag in warning for warning in check(gpt_settings(**changes))] == [True]
