"""Megatron's engines on a GPU: each token that they generate is the most likely one."""

import json
import re

import harness
import pytest

pytestmark = pytest.mark.gpu

# heads of 64, which have kernels of their own
SERVED = {"hidden_size": 256, "ffn_hidden_size": 384, "hgrn2_expand_ratio": 64, "init_method_std": 0.1}
BF16_TE = {"bf16": True, "transformer_impl": "transformer_engine"}


def assert_takes_the_likeliest(script: str, tp: int, *words: str, settings: dict, number: list[int]):
    """Run an engine, and compare the numbers of its tokens, in bf16 but for ties, of which there may be few."""
    harness.needs_gpus(tp)
    if "transformer_impl" in settings:
        pytest.importorskip("transformer_engine.pytorch")
    done = harness.torchrun(tp, f"tests/launcher/{script}.py", str(tp), *words, json.dumps(SERVED | settings))
    assert "op=triton" in done.stdout, done.stdout[-3000:]
    found = re.findall(r"(\d+) of (\d+) right(?:, (\d+) ties)?", done.stdout)
    print(found)
    assert [int(n) for _, n, _ in found] == tp * number, done.stdout[-3000:]
    if "cuda_graph_impl" in settings:
        assert [n for n in re.findall(r"(\d+) CUDA graphs", done.stdout) if n != "0"]
    least = 0.9 if "bf16" in settings else 1
    for right, n, ties in found:
        assert int(right) + int(ties or 0) == int(n) and int(right) >= least * int(n), found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("settings", [{}, BF16_TE], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("pattern", "engine"), [("H", "legacy"), ("H*H", "legacy"), ("H", "dynamic")])
def test_the_static_engine_takes_the_likeliest_tokens(pattern, engine, settings, tp):
    settings = settings | {"hgrn2_layer_pattern": pattern}
    assert_takes_the_likeliest("static_engine", tp, engine, "512", settings=settings, number=4 * [512])


CACHE = {"engine": {"enable_prefix_caching": True, "prefix_caching_eviction_policy": "lru"}}
DRAFTS = {"hybrid_layer_pattern": "M-M-/M-/M-", "few": 4, "engine": {"num_speculative_tokens": 2} | CACHE["engine"]}


@pytest.mark.parametrize("scope", ["layer", "block"])
@pytest.mark.parametrize("settings", [{}, BF16_TE], ids=["fp32", "bf16"])
def test_the_dynamic_engine_takes_the_likeliest_tokens_in_cuda_graphs(settings, scope):
    settings = settings | {"cuda_graph_impl": "local", "inference_cuda_graph_scope": scope}
    assert_takes_the_likeliest("dynamic_engine", 1, "1", settings=settings, number=[131])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("settings", [{}, BF16_TE], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", [{}, DRAFTS], ids=["plain", "drafts"])
def test_the_dynamic_engine_takes_the_likeliest_tokens(engine, settings, tp):
    settings = settings | engine | {"sequence_parallel": tp > 1}
    assert_takes_the_likeliest("dynamic_engine", tp, "1", settings=settings, number=[131])


@pytest.mark.parametrize("engine", [{}, CACHE], ids=["plain", "cache"])
def test_a_hybrid_in_the_dynamic_engine(engine):
    # Where flash-attn is not installed, a reference in PyTorch takes its place.
    settings = BF16_TE | engine | {"hybrid_layer_pattern": "M-*-M-"}
    assert_takes_the_likeliest("dynamic_engine", 1, "1", settings=settings, number=[131])
