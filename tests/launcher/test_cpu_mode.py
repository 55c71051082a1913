"""Megatron's loop on a machine without CUDA: what the README's commands make, in each dtype, with no flag added."""

import importlib.util

import harness
import pytest
import torch
from model_settings import gpt_settings, stack_settings
from training import FLAGS, HGRN2, LAUNCHER, STACK, losses_of

from hgrn2_megatron import UsageError, cpu, cpu_requirements
from hgrn2_megatron.requirements import check

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU mode is for machines without a GPU")

EXPERTS = ("--num-experts", "2")
GPT, HYBRID_MODEL = "examples/pretrain_gpt.py", "examples/pretrain_hybrid.py"
MODELS = {
    "pure": (GPT, *HGRN2),
    "hybrid": (GPT, *HGRN2, "--hgrn2-layer-pattern", "H*"),
    "experts": (GPT, *HGRN2, *EXPERTS, "--hgrn2-layer-pattern", "H*"),
    "HybridModel": (HYBRID_MODEL, *STACK, *EXPERTS, "--hybrid-layer-pattern", "M-*E"),
}


def train(model: str, *flags: str) -> dict[int, float]:
    """Losses by iteration of a run without `--use-cpu-initialization`, which no command of the README has."""
    run = [flag for flag in FLAGS if flag != "--use-cpu-initialization"]
    done = harness.torchrun(1, *LAUNCHER, *MODELS[model][:1], *run, *MODELS[model][1:], *flags)
    assert done.returncode == 0, done.stdout[-3000:]
    return {iteration: float(loss) for iteration, loss in losses_of(done.stdout).items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_model_trains_in_every_dtype(model, dtype):
    losses = train(model, *(["--bf16"] if dtype == "bf16" else []))
    assert losses[8] < losses[1] - 0.3


def test_fp16_trains_once_the_loss_scale_has_come_down():
    losses = train("hybrid", "--fp16", "--train-iters", "28")
    # an iteration whose gradients overflow is skipped, and logs no loss or one of zero
    taken = [loss for loss in losses.values() if loss]
    assert len(taken) >= 8 and taken[-1] < taken[0] - 0.3


MUON = "--use-distributed-optimizer with --optimizer muon on several data-parallel or context-parallel ranks"
ALL_TO_ALL = "--moe-token-dispatcher-type alltoall with --tensor-model-parallel-size and --expert-model-parallel-size"
NO_EXPERTS = "--expert-model-parallel-size with a pipeline stage that has no experts, and --save or --load,"
EP2, PP2 = {"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
NEED_CUDA = [
    ({"distributed_backend": "nccl"}, "--distributed-backend nccl"),
    ({"transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine"),
    ({"hybrid_layer_pattern": "M-G-"}, "a G in --hybrid-layer-pattern"),
    ({"fp8": "hybrid", "transformer_impl": "transformer_engine_in_a_test"}, "--fp8-format"),
    ({"enable_cuda_graph": True}, "--cuda-graph-impl"),
    ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
    ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl"),
    ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
    ({"cpu_offloading_num_layers": 1}, "--cpu-offloading-num-layers"),
    ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
    ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
    ({"tp_comm_overlap": True}, "--tp-comm-overlap"),
    ({"nccl_ub": True}, "--use-nccl-ub"),
    ({"save_activations_interval": 1}, "--save-activations-interval or --save-dgrads-interval"),
    ({"save_dgrads_interval": 1}, "--save-activations-interval or --save-dgrads-interval"),
    (
        {"num_distributed_optimizer_instances": 2, "overlap_grad_reduce": True},
        "--num-distributed-optimizer-instances with --overlap-grad-reduce",
    ),
    (
        {"ckpt_fully_parallel_load_exchange_algo": "gather_rounds"},
        "--ckpt-fully-parallel-load-exchange-algo gather_rounds",
    ),
    ({"use_sharp": True}, "--use-sharp"),
    ({"moe_permute_fusion": True}, "--moe-permute-fusion"),
    ({"moe_router_fusion": True}, "--moe-router-fusion"),
    ({"moe_token_dispatcher_type": "flex"}, "--moe-token-dispatcher-type flex"),
    ({"moe_enable_deepep": True}, "--moe-token-dispatcher-type flex"),
    (dict(moe_token_dispatcher_type="alltoall", **EP2, tensor_model_parallel_size=2, num_experts=4), ALL_TO_ALL),
    (dict(**EP2, **PP2, save="here", num_experts=4, num_layers=2, moe_layer_freq=[0, 1]), NO_EXPERTS),
    (dict(**EP2, **PP2, load="here", num_experts=4, hybrid_layer_pattern="M-M-|*EME"), NO_EXPERTS),
    (dict(**EP2, **PP2, load="here", num_experts=4, hybrid_layer_pattern="M-|ME/ME"), NO_EXPERTS),
    ({"moe_routing_trace_path": "trace"}, "--moe-routing-trace-path"),
    ({"use_te_activation_func": True}, "--use-te-activation-func"),
    ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser"),
    ({"fused_residual_rmsnorm": True}, "--fused-residual-rmsnorm"),
    ({"symmetric_ar_type": "two_shot"}, "--symmetric-ar-type"),
    ({"gpu_sniff_test_interval": 1}, "--gpu-sniff-test-interval"),
    ({"record_memory_history": True}, "--record-memory-history"),
    ({"log_memory_to_tensorboard": True}, "--log-memory-to-tensorboard"),
    ({"profile": True}, "--profile"),
    ({"optimizer": "muon", "use_distributed_optimizer": True, "world_size": 2}, MUON),
    ({"optimizer": "dist_muon", "world_size": 2, "context_parallel_size": 2}, MUON),
]


@pytest.mark.parametrize(("changes", "flag"), NEED_CUDA)
def test_what_needs_cuda_is_refused_by_flag_without_it_alone(changes, flag, monkeypatch):
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    stack = "hybrid_layer_pattern" in changes
    settings = (stack_settings if stack else gpt_settings)(**changes)
    check(settings, stack)
    monkeypatch.setattr(cpu, "installed", lambda: True)
    with pytest.raises(UsageError, match=f"^{flag} does not work on a machine without CUDA: "):
        check(settings, stack)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layer_freq": [1, 1]},
        # each stage has a virtual stage with experts
        {"moe_layer_freq": [0, 1] * 2, "num_layers": 4, "num_layers_per_virtual_pipeline_stage": 2},
        {"moe_layer_freq": [0, 0, 1, 1], "num_layers": 4, "num_virtual_stages_per_pipeline_rank": 2},
        {"moe_layer_freq": [0, 1], "save": None},
        {"moe_layer_freq": [0, 1], "expert_model_parallel_size": 1},
        {"moe_token_dispatcher_type": "alltoall", "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ],
    ids=str,
)
def test_experts_that_a_cpu_can_train_and_save(changes, monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: True)
    check(gpt_settings(**dict(**EP2, **PP2, save="here", num_experts=4, num_layers=2, moe_layer_freq=1) | changes))


@pytest.mark.parametrize("pattern", ["ME|M-/ME", "ME|M-|ME|M-/ME"])
def test_experts_of_a_head_are_those_of_the_last_stage(pattern, monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: True)
    check(stack_settings(**EP2, **PP2, save="here", num_experts=4, hybrid_layer_pattern=pattern), stack=True)


def test_a_coalesced_exchange_ends_with_its_block():
    done = harness.torchrun(2, "tests/launcher/coalesced.py")
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_profile_of_the_cpu_is_pytorchs(monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: True)
    check(gpt_settings(profile=True, use_pytorch_profiler=True))


def test_one_data_parallel_rank_gathers_nothing_for_muon(monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: True)
    divided = dict(optimizer="muon", use_distributed_optimizer=True, world_size=2, tensor_model_parallel_size=2)
    assert check(gpt_settings(**divided)) == []


def test_every_flag_that_needs_cuda_is_in_the_table_above():
    assert [flag for _, flag, _ in cpu_requirements.NEEDS_CUDA] == list(dict.fromkeys(flag for _, flag in NEED_CUDA))
