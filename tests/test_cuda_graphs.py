"""The rules of CUDA graphs: what can be captured, and the flags that are refused beside --cuda-graph-impl."""

import re

import megatron.core
import pytest
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.enums import AttnBackend, CudaGraphModule
from model_settings import gpt_settings, stack_settings

from hgrn2_megatron import UsageError
from hgrn2_megatron.cuda_graphs import NOT_WITH_CUDA_GRAPHS
from hgrn2_megatron.requirements import check

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
    (CUDA_GRAPHS, {"fine_grained_activation_offloading": True}, "--fine-grained-activation-offloading"),
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
    check(gpt_settings(**changes))
    for impl in impls:
        with pytest.raises(UsageError, match=f"--cuda-graph-impl {impl} cannot be used with {re.escape(flag)}: "):
            check(gpt_settings(cuda_graph_impl=impl, **changes))


def test_every_clash_with_cuda_graphs_is_in_the_table_above():
    assert [flag for _, flag, _ in NOT_WITH_CUDA_GRAPHS] == list(dict.fromkeys(flag for *_, flag in CUDA_GRAPH_CLASHES))


@pytest.mark.parametrize(("impls", "changes"), CUDA_GRAPH_FRIENDS)
def test_what_cuda_graphs_go_with_passes(impls, changes, monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.19.0")
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    for impl in impls:
        check(gpt_settings(cuda_graph_impl=impl, **changes))


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
        check(gpt_settings(cuda_graph_impl=impl, **EXPERTS, **changes))


@pytest.mark.parametrize("release", ["0.18.2", "0.19.0rc1", "0.20.0", "1.0.0"])
def test_stages_are_captured_by_layers_where_megatron_adds_every_gradient(release, monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", release)
    check(gpt_settings(cuda_graph_impl="full_iteration", **PP2))
    settings = gpt_settings(cuda_graph_impl="local", **PP2)
    if release in ("0.20.0", "1.0.0"):
        with pytest.raises(UsageError, match="--pipeline-model-parallel-size above 1, .* full_iteration"):
            check(settings)
    else:
        check(settings)


def test_a_hybrid_model_is_captured_as_the_gpt_is(monkeypatch):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)

    def check_stack(impl, **changes):
        check(stack_settings(transformer_impl="transformer_engine", cuda_graph_impl=impl, **changes), stack=True)

    check_stack("local", seq_length=64)
    for impl in CUDA_GRAPHS:
        check_stack(impl, seq_length=64, hybrid_layer_pattern="M-M-")
        check_stack(impl, seq_length=256)
    with pytest.raises(UsageError, match="cannot be used with fused attention layers at this --seq-length: "):
        check_stack("full_iteration", seq_length=64)
