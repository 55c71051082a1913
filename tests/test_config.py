"""HGRN2Config and the rules about Megatron's other flags."""

import math
import re
import types

import megatron.core
import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.enums import AttnBackend, CudaGraphModule

from hgrn2_megatron import HGRN2Config, UsageError, muon, offloading, requirements, stack_requirements
from hgrn2_megatron.cuda_graphs import NOT_WITH_CUDA_GRAPHS
from hgrn2_megatron.requirements import NOT_WITH_CHUNKED_LOSS, UNSUPPORTED, UNSUPPORTED_IN_GPT, check
from hgrn2_megatron.settings import Settings

OFFLOAD = {"fine_grained_activation_offloading": True}


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("expand_ratio", 0, "--hgrn2-expand-ratio"),
        ("layer_pattern", "HXH", "--hgrn2-layer-pattern"),
        ("layer_pattern", "**", "--hgrn2-layer-pattern"),
        ("layer_pattern", "", "--hgrn2-layer-pattern"),
        ("layer_pattern", "H ", "the unknown letters ' '"),
        ("lower_bounds", "fixed", "--hgrn2-lower-bounds"),
        ("norm_eps", 0.0, "--hgrn2-norm-eps"),
        ("norm_eps", math.inf, "--hgrn2-norm-eps"),
        ("norm_eps", math.nan, "--hgrn2-norm-eps"),
    ],
)
def test_nonsense_is_refused_by_flag(field, value, flag):
    with pytest.raises(ValueError, match=flag):
        HGRN2Config(**{field: value})


def test_pattern_repeats_over_the_whole_depth():
    hgrn2 = HGRN2Config(layer_pattern="HHH*")
    assert [hgrn2.is_hgrn2_layer(i) for i in range(8)] == [True, True, True, False] * 2
    assert hgrn2.num_hgrn2_layers(6) == 5


def test_heads_need_a_multiple_of_the_expand_ratio():
    assert HGRN2Config(expand_ratio=32).num_heads(96) == 3
    with pytest.raises(ValueError, match="--hidden-size 100"):
        HGRN2Config(expand_ratio=32).num_heads(100)


def hgrn2_settings(**changes) -> types.SimpleNamespace:
    """Args of a true HGRN2 model, with changes."""
    base = dict(
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        add_bias_linear=False,
        swiglu=True,
        position_embedding_type="none",
        hidden_size=256,
        transformer_impl="local",
    )
    return types.SimpleNamespace(**base | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"sft": True, "micro_batch_size": 2},
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
    assert check(Settings(hgrn2_settings(**changes))) == []


def test_a_true_hgrn2_block_passes_without_a_warning():
    assert check(Settings(hgrn2_settings())) == []


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"normalization": "LayerNorm"}, "--normalization"),
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"add_qkv_bias": True}, "--add-qkv-bias"),
        ({"swiglu": False}, "--swiglu"),
        ({"quick_geglu": True}, "--quick-geglu"),
        ({"gated_linear_unit": True, "activation_func": F.gelu}, "--swiglu"),
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
        ({"use_megatron_fsdp": True, "pipeline_model_parallel_size": 2}, "--use-megatron-fsdp .* --pipeline-model"),
        ({"use_megatron_fsdp": True, "save": "x", "bf16": False}, "--use-megatron-fsdp .* fp32: give --bf16"),
        (
            {"use_megatron_fsdp": True, "load": "x", "bf16": True, "data_parallel_sharding_strategy": "no_shard"},
            "--use-megatron-fsdp .* no_shard: give another strategy",
        ),
        (
            {"use_megatron_fsdp": True, "init_model_with_meta_device": True, "use_cpu_initialization": True},
            "--init-model-with-meta-device beside --use-cpu-initialization",
        ),
        ({"use_megatron_fsdp": True, "cuda_graph_impl": "local"}, "--use-megatron-fsdp .* --cuda-graph-impl"),
        (
            {"use_megatron_fsdp": True, "expert_model_parallel_size": 2, "world_size": 2},
            "--use-megatron-fsdp .* --expert-model-parallel-size",
        ),
        (
            {"use_megatron_fsdp": True, "hgrn2_loss_chunk_size": 8, "gradient_accumulation_fusion": True},
            "--use-megatron-fsdp .* --hgrn2-loss-chunk-size .* give --no-gradient-accumulation-fusion",
        ),
        ({"use_megatron_fsdp": True, "megatron_fsdp_version": 2}, "--megatron-fsdp-version 2: give 1"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 .* give --use-megatron-fsdp"),
        ({"sft": True, "hgrn2_layer_pattern": "HH*"}, "--sft packs sequences, which Megatron's own attention"),
        (
            {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2, "micro_batch_size": 2},
            "--dataloader-inter-document-masking .* give --micro-batch-size 1",
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
        (OFFLOAD | {"offload_modules": ["core_attn", "gdp_qkv"]}, "--offload-modules gdp_qkv"),
        (OFFLOAD | {"recompute_granularity": "full"}, "--fine-grained-activation-offloading with .* selective"),
        (
            {"overlap_moe_expert_parallel_comm": True, "num_layers": 3, "moe_layer_freq": [1, 1, 0]},
            "--overlap-moe-expert-parallel-comm with a last layer that has no experts",
        ),
        ({"batch_invariant_mode": True}, "--batch-invariant-mode"),
    ],
)
def test_what_cannot_train_hgrn2_is_refused_by_flag(changes, flag):
    with pytest.raises(UsageError, match=flag):
        check(Settings(hgrn2_settings(**changes)))


def test_every_unsupported_flag_is_in_the_table_above():
    params = test_what_cannot_train_hgrn2_is_refused_by_flag.pytestmark[0].args[1]
    tried = [hgrn2_settings(**changes) for changes, _ in params]
    for asked, flag, _ in UNSUPPORTED + offloading.UNSUPPORTED + UNSUPPORTED_IN_GPT:
        assert any(asked(Settings(settings)) for settings in tried), flag


@pytest.mark.parametrize(
    ("capability", "changes", "message"),
    [
        (
            (7, 5),
            {"bf16": True},
            "compute capability 7.5, and the kernels need 8.0 .* CUDA_VISIBLE_DEVICES=",
        ),
        ((9, 0), {"bf16": True, "hgrn2_expand_ratio": 512}, "bfloat16 .* --hgrn2-expand-ratio 256 or less$"),
        ((9, 0), {"hgrn2_expand_ratio": 512}, "float32 .* --hgrn2-expand-ratio 256 or less$"),
        ((8, 9), {"hgrn2_expand_ratio": 256}, "compute capability 8.9 .* --hgrn2-expand-ratio 128 or less, or --bf16$"),
        ((8, 9), {"hgrn2_expand_ratio": 256, "bf16": True}, None),
        ((8, 0), {"hgrn2_expand_ratio": 256}, None),
        ((8, 9), {}, None),
    ],
)
def test_heads_and_gpus_that_the_kernels_do_not_take_are_refused(capability, changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    settings = Settings(hgrn2_settings(hidden_size=1024, **changes))
    if message is None:
        return check(settings)
    with pytest.raises(UsageError, match=message):
        check(settings)


CHUNKED_LOSS_CLASHES = [
    ({"cross_entropy_loss_fusion": True}, "--cross-entropy-loss-fusion"),
    ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute"),
    ({"fp8_output_proj": True}, "--fp8-output-proj"),
    ({"logit_dtype": "fp32"}, "--output-logit-dtype"),
    ({"config_logger_dir": "logs"}, "--config-logger-dir, which writes the logits of a GPT"),
]


@pytest.mark.parametrize(("changes", "flag"), CHUNKED_LOSS_CLASHES)
def test_what_the_loss_by_chunks_does_not_go_with_is_refused_by_flag(changes, flag):
    check(Settings(hgrn2_settings(**changes)))
    check(Settings(hgrn2_settings(hgrn2_loss_chunk_size=8192)))
    with pytest.raises(UsageError, match=f"--hgrn2-loss-chunk-size cannot be used with {flag}: "):
        check(Settings(hgrn2_settings(hgrn2_loss_chunk_size=8192, **changes)))


def test_every_clash_with_the_loss_by_chunks_is_in_the_table_above():
    assert [flag for _, flag, _ in NOT_WITH_CHUNKED_LOSS] == [flag for _, flag in CHUNKED_LOSS_CLASHES]


CUDA_GRAPHS = ["local", "full_iteration"]
EXPERTS = {"num_moe_experts": 4}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
HYBRID = {"hgrn2_layer_pattern": "H*", "transformer_impl": "transformer_engine"}
CP2, PP2 = {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
UNFUSED = {"attention_backend": AttnBackend.unfused}
STAGES = "--pipeline-model-parallel-size above 1, with attention layers or from megatron-core 0.20 on"
SHORT = "fused attention layers at this --seq-length"
CUDA_GRAPH_CLASHES = [
    (CUDA_GRAPHS, {"sft": True}, "--sft"),
    (CUDA_GRAPHS, {"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
    (CUDA_GRAPHS, {"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
    (CUDA_GRAPHS, EXPERTS, "--num-experts without a capacity"),
    (["local"], {"train_iters": 8}, "--transformer-impl local"),
    (["local"], {"train_samples": 8}, "--transformer-impl local"),
    (["local"], HYBRID | PP2, STAGES),
    (CUDA_GRAPHS, OFFLOAD, "--fine-grained-activation-offloading"),
    (CUDA_GRAPHS, {"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
    (["full_iteration"], HYBRID | {"seq_length": 64}, SHORT),
    (CUDA_GRAPHS, HYBRID | CP2 | {"seq_length": 256}, SHORT),
]
CUDA_GRAPH_FRIENDS = [
    (CUDA_GRAPHS, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (CUDA_GRAPHS, {"fp8": "hybrid", "fp8_recipe": "delayed", "transformer_impl": "transformer_engine"}),
    (CUDA_GRAPHS, EXPERTS | PADDED),
    (CUDA_GRAPHS, {"seq_length": 63} | CP2),
    (CUDA_GRAPHS, PP2),
    (CUDA_GRAPHS, {"train_iters": 8, "transformer_impl": "transformer_engine"}),
    (["full_iteration"], {"train_iters": 8}),
    (["local"], EXPERTS | {"cuda_graph_modules": ["moe_router"]}),
    (["local"], EXPERTS | {"cuda_graph_modules": [CudaGraphModule.moe_router, CudaGraphModule.moe_preprocess]}),
    (["local"], HYBRID | {"seq_length": 64}),
    (CUDA_GRAPHS, HYBRID | {"seq_length": 256}),
    (CUDA_GRAPHS, HYBRID | CP2 | {"seq_length": 512}),
    (["full_iteration"], HYBRID | PP2 | {"seq_length": 256}),
    (CUDA_GRAPHS, HYBRID | UNFUSED | {"seq_length": 64}),
    (CUDA_GRAPHS, HYBRID | {"transformer_impl": "local", "seq_length": 64}),
]


@pytest.mark.parametrize(("impls", "changes", "flag"), CUDA_GRAPH_CLASHES)
def test_what_cuda_graphs_do_not_go_with_is_refused_by_flag(impls, changes, flag, monkeypatch):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    check(Settings(hgrn2_settings(**changes)))
    for impl in impls:
        with pytest.raises(UsageError, match=f"--cuda-graph-impl {impl} cannot be used with {re.escape(flag)}: "):
            check(Settings(hgrn2_settings(cuda_graph_impl=impl, **changes)))


@pytest.mark.parametrize(("impls", "changes"), CUDA_GRAPH_FRIENDS)
def test_what_cuda_graphs_go_with_passes(impls, changes, monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.19.0")
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    for impl in impls:
        check(Settings(hgrn2_settings(cuda_graph_impl=impl, **changes)))


@pytest.mark.parametrize(
    ("impl", "changes"),
    [
        *(("local", {name: value}) for name, value in PADDED.items()),
        ("local", {"cuda_graph_modules": [CudaGraphModule.attn, CudaGraphModule.moe_router]}),
        ("full_iteration", {"cuda_graph_modules": [CudaGraphModule.moe_router]}),
    ],
)
def test_experts_in_cuda_graphs_need_padding_or_a_graph_around_them(impl, changes):
    with pytest.raises(UsageError, match="--moe-pad-expert-input-to-capacity, or --cuda-graph-impl local "):
        check(Settings(hgrn2_settings(cuda_graph_impl=impl, **EXPERTS, **changes)))


@pytest.mark.parametrize("release", ["0.18.2", "0.19.0rc1", "0.20.0", "1.0.0"])
def test_stages_are_captured_by_layers_where_megatron_adds_every_gradient(release, monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", release)
    check(Settings(hgrn2_settings(cuda_graph_impl="full_iteration", **PP2)))
    settings = Settings(hgrn2_settings(cuda_graph_impl="local", **PP2))
    if release in ("0.20.0", "1.0.0"):
        with pytest.raises(UsageError, match="--pipeline-model-parallel-size above 1, .* full_iteration"):
            check(settings)
    else:
        check(settings)


def test_a_hybrid_model_is_captured_as_the_gpt_is(monkeypatch):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)

    def stack(**changes) -> Settings:
        return Settings(stack_settings(transformer_impl="transformer_engine", **changes))

    check(stack(cuda_graph_impl="local", seq_length=64), stack=True)
    for impl in CUDA_GRAPHS:
        check(stack(cuda_graph_impl=impl, seq_length=64, hybrid_layer_pattern="M-M-"), stack=True)
        check(stack(cuda_graph_impl=impl, seq_length=256), stack=True)
    with pytest.raises(UsageError, match="cannot be used with fused attention layers at this --seq-length: "):
        check(stack(cuda_graph_impl="full_iteration", seq_length=64), stack=True)


def test_every_clash_with_cuda_graphs_is_in_the_table_above():
    assert [flag for _, flag, _ in NOT_WITH_CUDA_GRAPHS] == list(dict.fromkeys(flag for *_, flag in CUDA_GRAPH_CLASHES))


def stack_settings(**changes) -> types.SimpleNamespace:
    """Args of a HybridModel with HGRN2 layers, with changes."""
    return hgrn2_settings(**dict(hybrid_layer_pattern="M-M-*-", position_embedding_type="rope") | changes)


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [("M-M-M-", "HHH"), ("M-*-|M-", "H*H"), ("MM--*", "HH*"), ("|M-", "H"), ("M-*-/M-/M-", "H*"), ("M-+-GE", "H+G")],
)
def test_blocks_of_a_hybrid_model_are_its_token_mixers(pattern, blocks):
    assert HGRN2Config.of_stack(stack_settings(hybrid_layer_pattern=pattern)).layer_pattern == blocks


@pytest.mark.parametrize(
    ("pattern", "stages", "fits"),
    [
        ("M-M-", 4, True),
        ("M-|M-", 2, True),
        ("M|-|M|-", 2, True),
        ("M-|M-", 1, False),
        ("M-|M-/M-", 2, True),
        ("M-|M|-", 2, False),
    ],
)
def test_segments_of_a_hybrid_model_are_those_of_the_stages(pattern, stages, fits):
    settings = Settings(stack_settings(hybrid_layer_pattern=pattern, pipeline_model_parallel_size=stages))
    if fits:
        return check(settings, stack=True)
    with pytest.raises(UsageError, match=f"segments for --pipeline-model-parallel-size {stages}: "):
        check(settings, stack=True)


def test_a_hybrid_model_with_hgrn2_layers_passes_without_a_warning():
    assert check(Settings(stack_settings()), stack=True) == []
    assert check(Settings(stack_settings(hybrid_layer_pattern="MEM-", num_experts=4)), stack=True) == []
    with_heads = dict(hybrid_layer_pattern="M-M-/M-/M-", mtp_num_layers=2, position_embedding_type="none")
    assert check(Settings(stack_settings(**with_heads)), stack=True) == []


@pytest.mark.parametrize(("heads", "is_split"), [(2, True), (4, False)])
def test_muon_of_the_oldest_release_splits_heads_of_the_size_of_attentions(heads, is_split, monkeypatch):
    settings = hgrn2_settings(optimizer="muon", num_attention_heads=heads)
    assert check(Settings(settings)) == []
    monkeypatch.setattr(muon, "megatron_release", lambda: (0, 18))
    warnings = check(Settings(settings))
    assert is_split == (warnings == []) and all("give --num-attention-heads 2" in warning for warning in warnings)
    weight = torch.nn.Parameter(torch.empty(768, 256))
    muon.mark_parts(weight, [128] * 3, Settings(settings))
    assert getattr(weight, "is_qkv", False) == is_split


LATENT = {"hybrid_layer_pattern": "M-+-", "multi_latent_attention": True, "position_embedding_type": "none"}


def test_multi_latent_attention_needs_a_release_that_has_it(monkeypatch):
    assert check(Settings(stack_settings(**LATENT)), stack=True) == []
    assert check(Settings(stack_settings(**LATENT, q_lora_rank=24, rope_type="rope")), stack=True) == []
    monkeypatch.setattr(stack_requirements, "megatron_release", lambda: (0, 18))
    with pytest.raises(UsageError, match="before megatron-core 0.19"):
        check(Settings(stack_settings(**LATENT)), stack=True)


def test_gated_delta_nets_need_a_gpu_and_their_package(monkeypatch):
    monkeypatch.setattr(stack_requirements.importlib.util, "find_spec", lambda name: name)
    delta = {"hybrid_layer_pattern": "M-G-"}
    assert check(Settings(stack_settings(**delta, linear_num_key_heads=4)), stack=True) == []
    packed = {"context_parallel_size": 2, "dataloader_inter_document_masking": True}
    with pytest.raises(UsageError, match="gated delta nets expect each document"):
        check(Settings(stack_settings(**delta, **packed)), stack=True)
    monkeypatch.setattr(requirements.cpu, "installed", lambda: True)
    with pytest.raises(UsageError, match="gated delta nets need a GPU"):
        check(Settings(stack_settings(**delta)), stack=True)


@pytest.mark.parametrize("pattern", ["H+", "HG"])
def test_a_gpt_has_no_layers_that_only_a_hybrid_model_has(pattern):
    with pytest.raises(UsageError, match="--hgrn2-layer-pattern .* only a HybridModel can have"):
        check(Settings(hgrn2_settings(hgrn2_layer_pattern=pattern)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_layer_pattern": None}, "needs --hybrid-layer-pattern"),
        ({"hybrid_layer_pattern": "M-/"}, "a / without a head"),
        ({"hybrid_layer_pattern": "*-/M-"}, "has no M before the first /"),
        ({"hybrid_layer_pattern": "M-/D-"}, "cannot have, 'D':"),
        ({"hybrid_layer_pattern": "M-/M-", "mtp_num_layers": 2}, "--mtp-num-layers is 2, but .* has 1 heads"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers is 1, but .* has 0 heads"),
        ({"hybrid_layer_pattern": "M-/ME"}, "--num-experts"),
        ({"hybrid_layer_pattern": "M-/*-", "context_parallel_size": 2}, "--context-parallel-size .* only 1"),
        (
            {
                "hybrid_layer_pattern": "M-/M-",
                "context_parallel_size": 2,
                "dataloader_inter_document_masking": True,
                "micro_batch_size": 1,
            },
            "--dataloader-inter-document-masking .* multi-token prediction expects each document",
        ),
        ({"hybrid_layer_pattern": "M-/M-", "hybrid_context_parallel": True}, "--hybrid-context-parallel with a /"),
        ({"enable_mhc_connections": True}, "--enable-mhc-connections"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm .* run pretrain_gpt.py"),
        ({"cpu_offloading_num_layers": 1}, "--cpu-offloading-num-layers .* --fine-grained-activation-offloading"),
        ({"hybrid_layer_pattern": "M-D-"}, "cannot have, 'D':"),
        ({"hybrid_layer_pattern": "M-G-"}, "without the package flash-linear-attention"),
        ({"hybrid_layer_pattern": "M-+-"}, r"a \+ in .* without --multi-latent-attention .*HGRN2MLATransformerConfig"),
        (LATENT | {"hybrid_layer_pattern": "M-*-"}, r"--multi-latent-attention without a \+"),
        (LATENT | {"hybrid_layer_pattern": "M-*-+-"}, r"a \* beside a \+"),
        (LATENT | {"position_embedding_type": "yarn"}, "give none, because layers of multi-latent attention"),
        (LATENT | {"tensor_model_parallel_size": 2}, "give --sequence-parallel"),
        (LATENT | {"mla_down_proj_fusion": True}, "--mla-down-proj-fusion with --transformer-impl local"),
        (LATENT | {"context_parallel_size": 2}, "--context-parallel-size is 2"),
        (LATENT | {"sft": True}, "--sft packs sequences"),
        ({"hybrid_layer_pattern": "*-*-"}, "has no M:"),
        ({"hgrn2_layer_pattern": "H*"}, "--hgrn2-layer-pattern 'H\\*' is for a GPT"),
        ({"hybrid_layer_pattern": "MEM-"}, "--num-experts"),
        ({"position_embedding_type": "mrope"}, "--position-embedding-type mrope"),
        ({"normalization": "LayerNorm"}, "--normalization"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
    ],
)
def test_what_a_hybrid_model_cannot_have_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        check(Settings(stack_settings(**changes)), stack=True)


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
    assert [flag in warning for warning in check(Settings(hgrn2_settings(**changes)))] == [True]


def test_biases_of_a_hybrids_attention_are_the_users_choice():
    check(Settings(hgrn2_settings(add_qkv_bias=True, hgrn2_layer_pattern="H*", position_embedding_type="rope")))
