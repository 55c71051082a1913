"""examples/generate.py and Megatron's server on checkpoints that its loop has just written, and Megatron's engines."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import harness
import pytest
from training import HGRN2, LAUNCHER, STACK, train

from hgrn2_megatron.settings import megatron_release

BYTES = ("--vocab-size", 257, "--train-iters", 2, "--save-interval", 2)
# the mixers of a small model -> Megatron's script that trains it, and its flags; the first model is a GPT
FORMS = {
    "H": ("pretrain_gpt.py", HGRN2),
    "H*": ("pretrain_hybrid.py", (*STACK, "--hybrid-layer-pattern", "M-*-")),
}
# longer than the sequences of the training
SAMPLE = "--use-checkpoint-args --prompt <<< --max-new-tokens 90 --temperature 0".split()


def sample(folder, *flags, num_processes=1) -> str:
    """All that a run prints."""
    script = "examples/generate.py"
    done = harness.torchrun(num_processes, *LAUNCHER, script, "--load", str(folder), *SAMPLE, *map(str, flags))
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.parametrize("pattern", FORMS)
def test_ranks_agree_and_say_what_is_kept(pattern, tmp_path):
    script, model = FORMS[pattern]
    train(*model, *BYTES, "--save", tmp_path, script=f"examples/{script}")
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


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ('{"hgrn2_layer_pattern": "H*H"}', "legacy"),
        ('{"hybrid_layer_pattern": "M-*-M-"}', "legacy"),
        ('{"hybrid_layer_pattern": "M-M-M-"}', "dynamic"),
    ],
)
def test_megatrons_static_engine_takes_the_likeliest_tokens(settings, engine):
    done = harness.python("tests/launcher/static_engine.py", "1", engine, "40", settings)
    assert done.stdout.count("40 of 40 right") == 4, done.stdout[-3000:]


CACHE = (
    {"enable_prefix_caching": True, "prefix_caching_eviction_policy": "lru"} if megatron_release() >= (0, 19) else {}
)
ENGINES = {
    "gpt": (1, 1, {}),
    "tp2": (
        2,
        1,
        {
            "hybrid_layer_pattern": "M-*-M-/M-/M-",
            "sequence_parallel": True,
            # or no draft of a head that is not trained is accepted
            "few": 4,
            "engine": {"num_speculative_tokens": 2} | CACHE,
        },
    ),
    # so deep that a wrong state from the cache changes tokens
    "pp2": (1, 2, {"hybrid_layer_pattern": "M-M-M-M-M-M-M-M-", "engine": CACHE}),
}


@pytest.mark.releases
@pytest.mark.parametrize("case", ENGINES)
def test_megatrons_dynamic_engine_takes_the_likeliest_tokens(case):
    tp, pp, settings = ENGINES[case]
    num_processes = tp * pp
    done = harness.torchrun(num_processes, "tests/launcher/dynamic_engine.py", str(tp), str(pp), json.dumps(settings))
    assert done.stdout.count("131 of 131 right") == num_processes, done.stdout[-3000:]
    # or the requests no longer meet what they are to meet
    found = re.search(r"paused in (\d+) steps, (\d+) evicted, (\d+) states restored\s+(\d+) steps", done.stdout)
    paused, evicted, restored, steps = map(int, found.groups())
    assert evicted and (paused or case == "tp2")
    assert bool(restored) == settings.get("engine", {}).get("enable_prefix_caching", False)
    # fewer steps than without drafts that are accepted
    assert (steps < 50) == (case == "tp2")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(script, folder, log):
    """Megatron's server on a checkpoint; gives the address of its API, which may not be up yet, and the process."""
    port = free_port()
    flags = "--use-checkpoint-args --micro-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 127".split()
    command = [sys.executable, *LAUNCHER, script, *flags, "--load", folder, "--port", port]
    ranks = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=harness.ROOT,
            env=harness.environment() | ranks,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://localhost:{port}/api", process
    finally:
        process.kill()
        process.wait()


def answer(address: str, process, prompts: list[str], tokens: int) -> list[list[int]]:
    """The tokens of prompts and answers, once the server is up; it may take minutes to compile Megatron's helpers."""
    body = json.dumps({"prompts": prompts, "tokens_to_generate": tokens, "top_k": 1}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="PUT")
    for _ in range(180):
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)["tokens"]
        except urllib.error.HTTPError:
            break
        except urllib.error.URLError:
            if process.poll() is not None:
                break
        time.sleep(1)
    return []


@pytest.mark.parametrize(("pattern", "server"), [("H", "text"), ("H*", "hybrid_text")])
def test_megatrons_server_answers(pattern, server, megatron_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(megatron_lm))
    trainer, model = FORMS[pattern]
    saving = ("--train-iters", 2, "--save-interval", 2, "--save", tmp_path / "saved")
    train(*model, *saving, script=str(megatron_lm / trainer))
    script, log = megatron_lm / f"tools/run_{server}_generation_server.py", tmp_path / "log"
    with serving(script, tmp_path / "saved", log) as running:
        answers = answer(*running, ["1 2 3", "7"], 12)
        assert [len(tokens) for tokens in answers] == [15, 13], log.read_text()[-3000:]
        # a longer prompt goes on as the answer did
        for tokens in answers:
            assert answer(*running, [" ".join(map(str, tokens[:8]))], len(tokens) - 8) == [tokens]
