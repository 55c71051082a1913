"""Mistakes a user makes: the launcher stops before the first iteration and names the flag to change."""

from importlib.util import find_spec

import harness
import pytest
import torch

SIZES = "--num-layers 2 --hidden-size 64 --hgrn2-expand-ratio 32 --num-attention-heads 2 --seq-length 32"
RUN = "--max-position-embeddings 32 --mock-data --tokenizer-type NullTokenizer --vocab-size 64"
STEPS = "--micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-3 --eval-iters 0 --eval-interval 9"
SCRIPT = "examples/pretrain_gpt.py"


def launch(flags: str):
    words = f"{SIZES} {RUN} {STEPS} {flags}".split()
    return harness.python("-m", "hgrn2_megatron", SCRIPT, *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--spec hgrn", "--spec hgrn"),
        ("--spec hgrn2_megatron.spce hgrn2", "--spec hgrn2_megatron.spce"),
        ("--spec hgrn2_megatron.spec hgrn3", "has no hgrn3"),
        ("--spec hgrn2 --hgrn2-layer-pattern HM", "--hgrn2-layer-pattern"),
        (
            "--spec hgrn2 --hgrn2-expand-ratio 64 --tensor-model-parallel-size 2",
            "--tensor-model-parallel-size",
        ),
        ("--spec hgrn2 --hidden-size 72 --hgrn2-expand-ratio 36 --fp8-format hybrid", "--hidden-size 72"),
        ("--spec hgrn2 --transformer-impl transformer_engine", "--transformer-impl"),
        pytest.param(
            "--spec hgrn2 --distributed-backend nccl",
            "--distributed-backend nccl does not work on a machine without CUDA: give gloo",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU mode is for machines without a GPU"),
        ),
        ("--spec hgrn2 --normalization LayerNorm", "--normalization"),
        ("--spec hgrn2 --add-qkv-bias", "--add-qkv-bias"),
        ("--spec hgrn2 --hgrn2-loss-chunk-size 8 --cross-entropy-loss-fusion", "--cross-entropy-loss-fusion"),
        ("--spec hgrn2 --cuda-graph-impl transformer_engine", "--cuda-graph-impl transformer_engine"),
        (
            "--spec hgrn2 --cuda-graph-impl local --num-experts 2",
            "--cuda-graph-impl local cannot be used with --num-experts",
        ),
        ("--hgrn2-loss-chunk-size 8", "--hgrn2-loss-chunk-size 8 would do nothing without --spec hgrn2"),
        pytest.param(
            "--hybrid-layer-pattern M-M-",
            "M in --hybrid-layer-pattern is Mamba without a --spec, and mamba-ssm is not installed: give --spec hgrn2",
            marks=pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed"),
        ),
        ("--spec hgrn2_stack --hybrid-layer-pattern M-D-", "--hybrid-layer-pattern 'M-D-'"),
    ],
)
def test_a_mistake_stops_the_run_and_names_the_flag(flags, message):
    done = launch(flags)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("hgrn2_megatron: error:")]
    assert len(errors) == 1 and message in errors[0], done.stdout[-2000:]
    assert "iteration        1/" not in done.stdout


def test_the_command_of_these_tests_is_right_without_the_mistake():
    done = harness.torchrun(1, "-m", "hgrn2_megatron", SCRIPT, *f"{SIZES} {RUN} {STEPS} --spec hgrn2".split())
    assert done.returncode == 0, done.stdout[-2000:]
    assert "HGRN2: 2 of 2 layers, expand 32, lower bounds learned, op=pytorch" in done.stdout
    assert "iteration        1/" in done.stdout


def test_a_folder_without_a_checkpoint_to_take_the_model_from(tmp_path):
    words = f"{RUN} {STEPS} --use-checkpoint-args --load {tmp_path}/nowhere".split()
    done = harness.python("-m", "hgrn2_megatron", "examples/pretrain_hybrid.py", *words)
    assert done.returncode == 2 and f"error: --load {tmp_path}/nowhere has no checkpoint from which" in done.stdout


def test_flags_of_the_plugin_without_a_spec_are_named():
    done = harness.torchrun(1, "-m", "hgrn2_megatron", SCRIPT, *f"{SIZES} {RUN} {STEPS}".split())
    warning = "HGRN2 warning: without --spec hgrn2 no layer is HGRN2, and these flags have no effect: --hgrn2-expand-"
    assert done.returncode == 0 and f"{warning}ratio\n" in done.stdout, done.stdout[-2000:]


def test_a_script_that_is_not_there():
    done = harness.python("-m", "hgrn2_megatron", "pretrain_gtp.py", "--spec", "hgrn2")
    assert done.returncode == 2 and "pretrain_gtp.py is not a file" in done.stdout


@pytest.mark.parametrize("spec", [["hgrn2"], ["hgrn2_megatron.spec", "hgrn2_stack"], []], ids=str)
def test_a_script_that_builds_another_model(spec, tmp_path):
    script = tmp_path / "pretrain_t5.py"
    script.write_text("print('this script ran')")
    done = harness.python("-m", "hgrn2_megatron", str(script), *(["--spec", *spec] if spec else []))
    if spec:
        assert done.returncode == 2 and "pretrain_t5.py builds another model: run pretrain_hybrid.py" in done.stdout
    assert ("this script ran" in done.stdout) == (not spec)


def test_usage():
    assert "--spec hgrn2" in harness.python("-m", "hgrn2_megatron", "--help").stdout
