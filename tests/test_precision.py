"""What FP8 and FP4 are refused for: recipes that were never run, GPUs that do not compute them, and sizes."""

import argparse

import pytest
from megatron.core.enums import Fp8Recipe

from hgrn2_megatron import UsageError, cpu, precision
from hgrn2_megatron.precision import CAPABILITIES, check
from hgrn2_megatron.settings import Settings

A100, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)


def settings(recipe="delayed", **changes) -> Settings:
    base = {"fp8": "hybrid", "fp8_recipe": recipe, "transformer_impl": "transformer_engine", "hidden_size": 256}
    return Settings(argparse.Namespace(**base | changes))


@pytest.mark.parametrize("as_enum", [False, True])
@pytest.mark.parametrize(
    ("recipe", "able"),
    [
        ("delayed", [ADA, HOPPER, BLACKWELL]),
        ("tensorwise", [ADA, HOPPER, BLACKWELL]),
        ("blockwise", [HOPPER, BLACKWELL]),
    ],
)
def test_a_recipe_needs_a_gpu_that_computes_it(recipe, able, as_enum):
    given = settings(Fp8Recipe(recipe) if as_enum else recipe)
    check(given, None)
    for capability in (A100, ADA, HOPPER, BLACKWELL):
        if capability in able:
            check(given, capability)
        else:
            with pytest.raises(UsageError, match=f"--fp8-recipe {recipe} needs .* has 8.{capability[1]}: give "):
                check(given, capability)


def test_the_message_names_a_recipe_that_the_gpu_computes():
    with pytest.raises(UsageError, match="give --fp8-recipe delayed or --fp8-recipe tensorwise"):
        check(settings("blockwise"), ADA)
    with pytest.raises(UsageError, match="give --bf16 alone"):
        check(settings("delayed"), A100)


NEVER_RUN = [
    ({"fp8": None, "fp4": "e2m1"}, "--fp4-format .* give --fp8-format or --bf16, .* compute capability 10.0"),
    ({"fp8_recipe": "mxfp8"}, "--fp8-recipe mxfp8 .* give delayed, tensorwise or blockwise, .* capability 10.0"),
    ({"fp8_recipe": "custom"}, "--fp8-recipe custom .* give delayed, tensorwise or blockwise"),
    ({"transformer_impl": "local"}, "--fp8-format with --transformer-impl local .* transformer_engine"),
]


@pytest.mark.parametrize(("changes", "message"), NEVER_RUN)
@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
def test_what_was_never_run_is_refused_on_every_gpu(changes, message, capability):
    with pytest.raises(UsageError, match=message):
        check(settings(**changes), capability)


def test_every_row_is_tried_above():
    for asked, flag, _ in precision.UNSUPPORTED:
        assert any(asked(settings(**changes)) for changes, _ in NEVER_RUN), flag
    assert {r.value for r in Fp8Recipe} == {*CAPABILITIES, "mxfp8", "custom"}


@pytest.mark.parametrize("changes", [{"hidden_size": 72}, {"hidden_size": 48, "tensor_model_parallel_size": 2}])
def test_sizes_that_fp8_does_not_take_are_refused(changes):
    with pytest.raises(UsageError, match="multiple of 16 channels .* change --hidden-size"):
        check(settings(**changes), HOPPER)


def test_without_fp8_nothing_is_refused():
    check(settings(fp8=None, hidden_size=72, fp8_recipe="mxfp8"), A100)


def test_on_a_cpu_the_message_is_that_fp8_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: True)
    check(settings(transformer_impl="local"), None)
