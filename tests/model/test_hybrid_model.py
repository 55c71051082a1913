"""Megatron's HybridModel with HGRN2 at M: the same function as the GPT form, and refusals when it is built."""

import harness
import pytest
import torch

from hgrn2_megatron.forms import gpt_name


def build(**config):
    harness.start_megatron()
    return harness.build_model(**config)


def results(model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every parameter."""
    model.load_state_dict(weights, strict=False)
    tokens, labels = harness.batch()
    # given, because Megatron would draw its own on a CUDA device
    causal = torch.ones(1, 1, harness.SEQ, harness.SEQ, dtype=torch.bool).triu(1)
    logits = model(tokens, None, causal)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("pattern", "gpt"),
    [
        ("M-M-M-", {"num_layers": 3}),
        ("M-*-M-", {"num_layers": 3, "hgrn2_layer_pattern": "H*H"}),
        ("*-M-ME", {"num_layers": 3, "hgrn2_layer_pattern": "*HH", "moe_layer_freq": [0, 0, 1]}),
    ],
)
def test_the_function_is_that_of_the_gpt_form(pattern, gpt, capsys):
    experts = {"num_moe_experts": 2, "moe_token_dispatcher_type": "allgather"} if "E" in pattern else {}
    hybrid, reference = build(hybrid_layer_pattern=pattern, **experts), build(**gpt, **experts)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HGRN2:")]
    assert len(lines) == 2 and lines[0] == lines[1]
    weights = harness.full_weights(reference)
    names = {name: gpt_name(name) for name, _ in hybrid.named_parameters()}
    assert sorted(names.values()) == sorted(weights)
    ours = results(hybrid, {name: weights[names[name]] for name in names})
    theirs = results(reference, weights)
    harness.assert_all_close({names.get(name, name): x for name, x in ours.items()}, theirs, tolerance=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hybrid_layer_pattern": "M-D-"}, "--hybrid-layer-pattern 'M-D-'"),
        ({"hybrid_layer_pattern": "ME"}, "--num-experts"),
        ({"hybrid_layer_pattern": "M-", "hgrn2_layer_pattern": "H*"}, "--hgrn2-layer-pattern"),
        ({"hybrid_layer_pattern": "M-", "normalization": "LayerNorm"}, "--normalization"),
        ({"hybrid_layer_pattern": "M-|M-"}, "2 segments for --pipeline-model-parallel-size 1"),
    ],
)
def test_the_model_is_refused_when_it_is_built(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


def test_the_specs_of_a_gpt_and_of_a_hybrid_model_are_not_each_others(monkeypatch):
    from hgrn2_megatron import spec

    gpt, stack = spec.hgrn2, spec.hgrn2_stack
    monkeypatch.setattr(spec, "hgrn2", stack)
    with pytest.raises(ValueError, match="give a GPT --spec hgrn2_megatron.spec hgrn2"):
        build()
    monkeypatch.setattr(spec, "hgrn2_stack", gpt)
    with pytest.raises(ValueError, match="give HybridModel --spec hgrn2_megatron.spec hgrn2_stack$"):
        build(hybrid_layer_pattern="M-")


class Stage:
    """What a chunk asks of the group of pipeline stages."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize(
    ("pattern", "own", "start", "stage", "right"),
    [
        ("M-M-", "M-M-", 0, Stage(0, 1), True),
        ("M-M-", "M-", 2, Stage(1, 2), True),
        ("M-|*-", "*-", 2, Stage(1, 2), True),
        ("M-|*-", "M-", 0, Stage(1, 2), False),  # of another stage
        ("M-M-", "", 0, Stage(0, 1), False),  # HybridModel was given no pattern
        ("M-M-", "", 2, Stage(1, 2), False),
        ("M-M-", "M-", 0, Stage(0, 1), False),  # a part of what the command line says
        ("M-M-|*-", "M-", 0, Stage(0, 2), False),
        ("M-|M-|*-|M-", "M-", 0, Stage(0, 2), False),  # four chunks where two are built
    ],
)
def test_a_chunk_is_one_of_those_that_the_known_pattern_has(pattern, own, start, stage, right):
    import types

    from hgrn2_megatron.stack import _check_chunk

    config = types.SimpleNamespace(virtual_pipeline_model_parallel_size=None)
    if right:
        return _check_chunk(pattern, own, start, config, stage)
    with pytest.raises(ValueError, match="--hybrid-layer-pattern"):
        _check_chunk(pattern, own, start, config, stage)


def test_the_pattern_of_a_single_stage_need_not_be_told_twice(capsys):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from hgrn2_megatron.spec import hgrn2_stack

    config = build(hybrid_layer_pattern="M-M-*-").config
    del config.hybrid_layer_pattern
    HybridModel(config, hgrn2_stack, harness.VOCAB, harness.SEQ, "M-M-*-", position_embedding_type="rope")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HGRN2:")]
    assert lines[0] == lines[1] and "2 of 3 layers" in lines[0]


def test_experts_that_no_layer_has_are_warned_of(capsys):
    experts = {"num_moe_experts": 2, "moe_token_dispatcher_type": "allgather"}
    for pattern, warnings in (("M-M-", 1), ("MEM-", 0), ("M-/ME", 0)):
        build(hybrid_layer_pattern=pattern, **experts)
        assert capsys.readouterr().out.count("--num-experts is 2, but no layer has experts") == warnings
