"""A HybridModel in bf16 on two tensor-parallel ranks, trained by Muon and its distributed optimizer."""

from training import STACK, assert_continues, train

# Attention's heads have another size than those of HGRN2, and Megatron logs the sizes by which it splits a weight.
MUON = (*STACK, "--hybrid-layer-pattern", "M-*-", "--kv-channels", "16", "--logging-level", "10", "--bf16")
MUON += ("--optimizer", "muon", "--use-distributed-optimizer", "--muon-tp-mode", "distributed")
MUON += ("--tensor-model-parallel-size", "2", "--sequence-parallel")


def test_muon_trains_and_resumes(tmp_path):
    run = dict(script="examples/pretrain_hybrid.py", num_processes=2)
    losses, output = train(*MUON, "--save", tmp_path, "--save-interval", 4, **run)
    assert "HGRN2: 1 of 2 layers, expand 32, lower bounds learned" in output and "HGRN2 warning" not in output
    for sizes in "[32, 32, 32]", "[16, 16, 16]":
        assert f"split shapes {sizes}" in output
    assert float(losses[8]) < float(losses[1]) - 0.3
    resumed, _ = train(*MUON, "--load", tmp_path, "--ckpt-step", 4, **run)
    assert_continues(resumed, losses)
