"""Megatron's own loop through the launcher: real runs, compared by the losses they log."""

import pytest
from training import HGRN2, STACK, assert_continues, launch, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run that saved its state after iteration 4: (losses, output, checkpoint folder)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    losses, output = train(*HGRN2, "--save", folder, "--save-interval", 4, "--log-throughput")
    return losses, output, folder


@pytest.mark.releases
def test_the_loss_falls_and_the_banner_says_what_was_built(run):
    losses, output, _ = run
    assert sorted(losses) == list(range(1, 9))
    assert float(losses[8]) < float(losses[1]) - 0.3
    assert "HGRN2: 2 of 2 layers, expand 32, lower bounds learned, op=pytorch" in output
    assert "HGRN2 warning" not in output
    assert "throughput per GPU (TFLOP/s/GPU)" in output
    assert "Theoretical memory footprints are not known for models with HGRN2 layers." in output


@pytest.mark.releases
def test_a_resumed_run_repeats_the_uninterrupted_one(run):
    resumed, _ = train(*HGRN2, "--load", run[2], "--ckpt-step", 4)
    assert_continues(resumed, run[0])


def test_checkpoint_args_restore_the_model_and_tensor_parallelism_can_change(run):
    flags = ("--load", run[2], "--ckpt-step", 4, "--use-checkpoint-args", "--hgrn2-expand-ratio", 16)
    resumed, output = train(*flags, "--tensor-model-parallel-size", 2, "--sequence-parallel", num_processes=2)
    assert "HGRN2: 2 of 2 layers, expand 32" in output
    for i in (5, 8):
        assert abs(float(resumed[i]) - float(run[0][i])) < 2e-6


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--hgrn2-expand-ratio", 16), ("--hgrn2-layer-pattern", "H*"), ("--num-layers", 4)],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(run, flag, value):
    done = launch(*HGRN2, "--load", run[2], flag, value)
    assert done.returncode != 0 and "iteration        5/" not in done.stdout
    assert f"hgrn2_megatron: error: {flag} is " in done.stdout, done.stdout[-2000:]


def test_attention_and_a_hybrid_train_by_the_same_command():
    block = "--normalization RMSNorm --disable-bias-linear --swiglu --position-embedding-type rope".split()
    attention, output = train(*block)
    assert "HGRN2:" not in output
    hybrid, output = train(*HGRN2, "--hgrn2-layer-pattern", "H*")
    assert "HGRN2: 1 of 2 layers" in output
    assert attention[1] != hybrid[1]


def test_experts_take_the_place_of_the_channel_mixer():
    losses, output = train(*HGRN2, *"--num-experts 4 --moe-token-dispatcher-type allgather".split())
    assert "HGRN2: 2 of 2 layers" in output
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight" in output
    assert float(losses[8]) < float(losses[1])


def test_bf16_trains_and_resumes(tmp_path):
    losses, _ = train(*HGRN2, "--bf16", "--save", tmp_path, "--save-interval", 4)
    assert float(losses[8]) < float(losses[1]) - 0.3
    resumed, _ = train(*HGRN2, "--bf16", "--load", tmp_path, "--ckpt-step", 4)
    assert_continues(resumed, losses)


def test_lower_bounds_can_be_off():
    losses, output = train(*HGRN2, "--hgrn2-lower-bounds", "none")
    assert "lower bounds none" in output and "hgrn2_bounds" not in output
    assert float(losses[8]) < float(losses[1])


def assert_equal_losses(got, want):
    assert got.keys() == want.keys()
    assert all(abs(float(got[i]) - float(want[i])) <= 2e-6 for i in want), (got, want)


def test_context_parallel_ranks_log_what_one_process_does(run):
    losses, _ = train(*HGRN2, "--context-parallel-size", 2, num_processes=2)
    assert_equal_losses(losses, run[0])


RECIPE = """
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000
    --ddp-average-in-collective --check-weight-hash-across-dp-replicas-interval 2 --log-params-norm
    --log-num-zeros-in-grad --rerun-mode validate_results --manual-gc --manual-gc-interval 2 --exit-signal-handler
    --empty-unused-memory-level 2 --check-for-spiky-loss --eval-micro-batch-size 1 --ckpt-format torch
""".split()


def test_flags_of_training_recipes_change_no_loss(run, tmp_path):
    """A HybridModel on two ranks logs the losses of the GPT on one, also when it resumes."""
    model = (*STACK, "--hybrid-layer-pattern", "M-M-", *RECIPE)
    where = dict(script="examples/pretrain_hybrid.py", num_processes=2)
    losses, output = train(*model, "--save", tmp_path, "--save-interval", 4, **where)
    assert "params norm: " in output and "num zeros: " in output
    assert_equal_losses(losses, run[0])
    # --ckpt-step is refused here
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    resumed, _ = train(*model, "--load", tmp_path, **where)
    assert_continues(resumed, run[0], tolerance=2e-6)


@pytest.mark.releases
def test_the_loss_by_chunks_is_the_loss(run):
    flags = (*HGRN2, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    # of the 128 tokens of a micro-batch
    chunked, output = train(*flags, "--hgrn2-loss-chunk-size", 50, num_processes=2)
    assert "op=pytorch, loss by 50 tokens" in output and sorted(chunked) == list(range(1, 9))
    assert_equal_losses(chunked, run[0])


def test_packed_streams_of_an_unmodified_script_over_context_parallel_ranks(run, megatron_lm):
    # from 0.19 on
    if "dataloader_inter_document_masking" not in (megatron_lm / "pretrain_gpt.py").read_text():
        pytest.skip("this Megatron-LM has no --dataloader-inter-document-masking")
    flags = (*HGRN2, "--dataloader-inter-document-masking")
    losses, ranks = (
        train(*flags, "--context-parallel-size", n, num_processes=n, script=str(megatron_lm / "pretrain_gpt.py"))[0]
        for n in (1, 2)
    )
    assert losses[8] != run[0][8]
    assert_equal_losses(ranks, losses)
