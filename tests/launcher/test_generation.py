"""examples/generate.py on a checkpoint that Megatron's loop has just written, and Megatron's static engine."""

import re

import harness
import pytest
from training import HGRN2, LAUNCHER, train

BYTES = ("--vocab-size", 257, "--train-iters", 2, "--save-interval", 2)
# longer than the sequences of the training
SAMPLE = "--use-checkpoint-args --prompt <<< --max-new-tokens 90 --temperature 0".split()


def sample(folder, *flags, num_processes=1) -> str:
    """All that a run prints."""
    script = "examples/generate.py"
    done = harness.torchrun(num_processes, *LAUNCHER, script, "--load", str(folder), *SAMPLE, *map(str, flags))
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.parametrize("pattern", ["H", "H*"])
def test_ranks_agree_and_say_what_is_kept(pattern, tmp_path):
    train(*HGRN2, "--hgrn2-layer-pattern", pattern, *BYTES, "--save", tmp_path)
    one, two = sample(tmp_path), sample(tmp_path, "--tensor-model-parallel-size", 2, num_processes=2)

    def text(output: str) -> str:
        return re.split(r"\n[\d,]+ bytes of states", output[output.rindex("<<<") :])[0]

    def kept(output: str) -> int:
        return int(re.findall(r"([\d,]+) bytes of states", output)[0].replace(",", ""))

    assert text(one) == text(two) and len(text(one)) > 90
    # 2 heads of 32 x 32 a layer, or keys and values of 93 tokens, in fp32
    layers = {"H": 2 * 32 * 32, "*": 2 * 93 * 64}
    assert kept(one) == 4 * (layers["H"] + layers[pattern[-1]])
    assert kept(two) == kept(one) // 2
    assert re.search(r"then [\d,.]+ tokens/s", one)


@pytest.mark.parametrize("pattern", ["H", "H*H"])
def test_megatrons_static_engine_takes_the_likeliest_tokens(pattern):
    done = harness.python("tests/launcher/static_engine.py", pattern)
    assert done.stdout.count("40 of 40 right") == 3, done.stdout[-3000:]
