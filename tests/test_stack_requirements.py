"""The rules of a HybridModel with HGRN2 layers: its layer pattern, and the flags that it cannot have."""

import pytest
from model_settings import stack_settings

from hgrn2_megatron import UsageError, cpu, stack_requirements
from hgrn2_megatron.requirements import check


def test_a_hybrid_model_with_hgrn2_layers_passes_without_a_warning():
    assert check(stack_settings(), stack=True) == []
    assert check(stack_settings(hybrid_layer_pattern="MEM-", num_experts=4), stack=True) == []
    with_heads = dict(hybrid_layer_pattern="M-M-/M-/M-", mtp_num_layers=2, position_embedding_type="none")
    assert check(stack_settings(**with_heads), stack=True) == []


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
    settings = stack_settings(hybrid_layer_pattern=pattern, pipeline_model_parallel_size=stages)
    if fits:
        return check(settings, stack=True)
    with pytest.raises(UsageError, match=f"segments for --pipeline-model-parallel-size {stages}: "):
        check(settings, stack=True)


LATENT = {"hybrid_layer_pattern": "M-+-", "multi_latent_attention": True, "position_embedding_type": "none"}


def test_multi_latent_attention_needs_a_release_that_has_it(monkeypatch):
    assert check(stack_settings(**LATENT), stack=True) == []
    assert check(stack_settings(**LATENT, q_lora_rank=24, rope_type="rope"), stack=True) == []
    monkeypatch.setattr(stack_requirements, "megatron_release", lambda: (0, 18))
    with pytest.raises(UsageError, match="before megatron-core 0.19"):
        check(stack_settings(**LATENT), stack=True)


def test_gated_delta_nets_need_a_gpu_and_their_package(monkeypatch):
    monkeypatch.setattr(stack_requirements.importlib.util, "find_spec", lambda name: name)
    delta = {"hybrid_layer_pattern": "M-G-"}
    assert check(stack_settings(**delta, linear_num_key_heads=4), stack=True) == []
    packed = {"context_parallel_size": 2, "dataloader_inter_document_masking": True}
    with pytest.raises(UsageError, match="gated delta nets expect each document"):
        check(stack_settings(**delta, **packed), stack=True)
    monkeypatch.setattr(cpu, "installed", lambda: True)
    with pytest.raises(UsageError, match="gated delta nets need a GPU"):
        check(stack_settings(**delta), stack=True)


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
                "hybrid_layer_pattern": "M-|M-|M-|M-",
                "pipeline_model_parallel_size": 2,
                "dataloader_inter_document_masking": True,
                "micro_batch_size": 1,
            },
            "--dataloader-inter-document-masking .* without virtual stages",
        ),
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
        check(stack_settings(**changes), stack=True)
