"""Megatron-FSDP: a run resumes exactly, and checkpoints that it cannot read, or that only it can read, are refused."""

from argparse import Namespace

import harness
import pytest
from training import STACK, assert_continues, train

FSDP = ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params")
FSDP += ("--ckpt-format", "fsdp_dtensor")


def test_a_run_resumes(tmp_path):
    flags = (*STACK, "--hybrid-layer-pattern", "M-*-", "--bf16", *FSDP)
    options = dict(script="examples/pretrain_hybrid.py", num_processes=2)
    losses, _ = train(*flags, "--save", tmp_path, "--save-interval", 4, **options)
    resumed, _ = train(*flags, "--load", tmp_path, "--ckpt-step", 4, **options)
    assert_continues(resumed, losses)


@pytest.mark.parametrize(
    ("sharded", "kind", "message"),
    [
        (True, "GLOBAL", "--use-megatron-fsdp cannot load a checkpoint that was saved without it"),
        (True, "LEGACY", "--use-megatron-fsdp cannot load a checkpoint that was saved without it"),
        (False, "TORCH_DCP", "give --use-megatron-fsdp --ckpt-format fsdp_dtensor"),
        (False, "FSDP_DTENSOR", "give --use-megatron-fsdp --ckpt-format fsdp_dtensor"),
        (True, "FSDP_DTENSOR", None),
        (False, "GLOBAL", None),
        (False, "LEGACY", None),
    ],
)
def test_a_checkpoint_of_another_format_is_refused(sharded, kind, message):
    harness.start_megatron()
    from megatron.training.checkpointing import CheckpointType

    from hgrn2_megatron import UsageError, checkpoint_check

    assert CheckpointType[kind]
    args = Namespace(use_megatron_fsdp=sharded)
    if message is None:
        checkpoint_check.check_format(args, kind)
    else:
        with pytest.raises(UsageError, match=message):
            checkpoint_check.check_format(args, kind)


@pytest.mark.parametrize("sharded", [True, False])
def test_only_megatron_fsdp_cannot_change_the_tensor_parallel_size(sharded):
    harness.start_megatron()
    from hgrn2_megatron import UsageError, checkpoint_check

    args, saved = (Namespace(use_megatron_fsdp=sharded, tensor_model_parallel_size=size) for size in (2, 4))
    checkpoint_check.check_tensor_parallel_size(args, args)
    if not sharded:
        checkpoint_check.check_tensor_parallel_size(args, saved)
    else:
        with pytest.raises(UsageError, match="is 2, but .* with 4.* give --tensor-model-parallel-size 4"):
            checkpoint_check.check_tensor_parallel_size(args, saved)
