"""The rules of Megatron-FSDP: the flags that are refused beside --use-megatron-fsdp."""

import pytest
from model_settings import gpt_settings

from hgrn2_megatron import UsageError
from hgrn2_megatron.requirements import check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model"),
        ({"save": "x", "bf16": False}, "fp32: give --bf16"),
        ({"load": "x", "bf16": True, "data_parallel_sharding_strategy": "no_shard"}, "no_shard: give another strategy"),
        (
            {"init_model_with_meta_device": True, "use_cpu_initialization": True},
            "--init-model-with-meta-device beside --use-cpu-initialization",
        ),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"expert_model_parallel_size": 2, "world_size": 2}, "--expert-model-parallel-size"),
        (
            {"hgrn2_loss_chunk_size": 8, "gradient_accumulation_fusion": True},
            "--hgrn2-loss-chunk-size .* give --no-gradient-accumulation-fusion",
        ),
        ({"load": "x", "bf16": True, "finetune": True}, "--pretrained-checkpoint, or --load with --finetune"),
        ({"load": "x", "bf16": True, "no_load_optim": True}, "--no-load-optim"),
        ({"pretrained_checkpoint": "x"}, "--pretrained-checkpoint, .*: drop the flag"),
        (
            {"load": "x", "bf16": True, "skip_train": True},
            "--load and --skip-train: drop --skip-train, .*--train-iters",
        ),
        ({"megatron_fsdp_version": 2}, "--megatron-fsdp-version 2: give 1"),
    ],
)
def test_what_megatron_fsdp_does_not_go_with_is_refused_by_flag(changes, message):
    with pytest.raises(UsageError, match=f"--use-megatron-fsdp cannot be used with .*{message}"):
        check(gpt_settings(use_megatron_fsdp=True, **changes))
