"""A model that is converted to Megatron and back has the bits that it had, also if Megatron trained it in between."""

import json

import pytest
import torch
from conversion_cases import (
    ATTENTION,
    CONFIG,
    EXPAND,
    HIDDEN,
    HYBRID,
    LAYERS,
    change,
    convert,
    convert_checked,
    hf_weights,
    read_hf,
    write_hf,
)
from training import STACK, assert_equal, train

from hgrn2_megatron.conversion.check import hf_logits
from hgrn2_megatron.conversion.config import as_gpt, megatron_args
from hgrn2_megatron.conversion.files import MegatronTensors, read_args
from hgrn2_megatron.forms import gpt_name


def as_a_gpt(tensors, args):
    """Return the tensors and args that a GPT would have saved."""
    return {gpt_name(name): x for name, x in tensors.items()}, as_gpt(args)


MODELS = {
    "pure": {},
    "tied": {"tie_word_embeddings": True},
    "no bounds": {"use_lower_bound": False},
    "hybrid": HYBRID,
    "no positions": {"attn": ATTENTION | {"rope_theta": None}},
    "vocabulary that fits": {"vocab_size": 256},
    "several files": {"files": 3},
    "bf16": {"dtype": torch.bfloat16},
    "gpt": HYBRID,
    "num_heads alone": {"expand_ratio": None, "num_heads": HIDDEN // EXPAND},
}


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Return a folder for each model, with the model in hf, and what became of it in megatron and in back."""
    folders = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, folder in folders.items():
        write_hf(folder / "hf", **MODELS[name])
    gpt = folders["gpt"]
    change(convert(gpt / "hf", gpt / "stack"), gpt / "megatron", as_a_gpt)
    there = [(folder / "hf", folder / "megatron") for name, folder in folders.items() if name != "gpt"]
    back = [(folder / "megatron", folder / "back") for folder in folders.values()]
    convert_checked([(words, False) for words in there + back])
    return folders


@pytest.mark.releases
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_exact(model, there_and_back):
    source, back = (there_and_back[model] / name for name in ("hf", "back"))
    expected, actual = read_hf(source), read_hf(back)
    assert {name: x.dtype for name, x in actual.items()} == {name: x.dtype for name, x in expected.items()}
    assert_equal(actual, expected)
    # the settings are the same to a reader, whatever is left to defaults
    given, written = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    settings = [vars(megatron_args(config)) | {"bf16": None} for config in (given, written)]
    assert settings[0] == settings[1]
    assert written["architectures"] == ["HGRN2ForCausalLM"]
    assert (back / "tokenizer.json").read_text() == '{"of": "a test"}'


def test_a_hybrid_model_is_written(there_and_back):
    args = read_args(there_and_back["hybrid"] / "megatron" / "release")
    assert (args.spec, args.hybrid_layer_pattern, args.num_layers) == ([*STACK[1:]], "M-*-M-", 2 * LAYERS)


def test_gate_and_up_as_one_matrix_of_old_checkpoints(tmp_path):
    weights = hf_weights(CONFIG)
    old = dict(weights)
    for layer in range(LAYERS):
        gate, up = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        old[gate] = torch.cat([old[gate], old.pop(up)])
    back = convert(convert(write_hf(tmp_path / "old", old), tmp_path / "megatron"), tmp_path / "back")
    assert_equal(read_hf(back), weights)


def test_another_dtype(tmp_path):
    source = write_hf(tmp_path / "hf")
    there, whole = convert(source, tmp_path / "megatron", "--dtype", "bf16"), convert(source, tmp_path / "whole")
    halves, wholes = ((folder / "release" / "__0_0.distcp").stat().st_size for folder in (there, whole))
    assert halves < 0.7 * wholes
    back = convert(there, tmp_path / "back")
    assert_equal(read_hf(back), hf_weights(CONFIG, torch.bfloat16))
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"
    narrow = convert(whole, tmp_path / "narrow", "--dtype", "bf16")
    assert_equal(read_hf(narrow), read_hf(back))


def test_the_padding_of_the_vocabulary_is_zeros(tmp_path):
    there = convert(write_hf(tmp_path / "hf"), tmp_path / "megatron")
    saved = MegatronTensors(there / "release")
    for ours, theirs in (("output_layer", "lm_head"), ("embedding.word_embeddings", "model.embeddings")):
        x = saved.read(f"{ours}.weight")
        assert x.shape == (256, HIDDEN) and (x[130:] == 0).all()
        assert torch.equal(x[:130], hf_weights(CONFIG)[f"{theirs}.weight"])


TP2_PP2 = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
# model -> layers with attention, and a pattern whose stages may end between the two layers of a pair
RUNS = {"pure": ([], "M-M|-M-"), "hybrid": ([0], "*-M-|M-")}


@pytest.mark.parametrize("model", RUNS)
def test_through_a_run_of_megatron(model, tmp_path, monkeypatch):
    """Convert there, train an iteration at learning rate 0 on TP2 x PP2, and convert back: no bit changes."""
    layers, pattern = RUNS[model]
    attn = ATTENTION | {"layers": layers} if layers else None
    source = write_hf(tmp_path / "hf", vocab_size=128, attn=attn)
    convert(source, tmp_path / "megatron")

    (tmp_path / "batches").mkdir()
    monkeypatch.setenv("BATCHES", str(tmp_path / "batches"))
    parts = (*TP2_PP2, "--sequence-parallel", "--hybrid-layer-pattern", pattern)
    load = ("--load", tmp_path / "megatron", "--use-checkpoint-args", "--num-attention-heads", 4, "--vocab-size", 128)
    save = ("--save", tmp_path / "trained", "--save-interval", 1, "--train-iters", 1, "--lr", 0)
    script = "tests/conversion/keeps_batches.py"
    losses, _ = train(*STACK, *parts, *load, *save, script=script, num_processes=4)
    weights = read_hf(source)
    config = json.loads((source / "config.json").read_text())
    batches = [torch.load(tmp_path / "batches" / f"{n}.pt") for n in (1, 2)]
    tokens, labels = (torch.cat([batch[name] for batch in batches]) for name in ("tokens", "labels"))
    logits = hf_logits(megatron_args(config), weights.__getitem__, tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(float(losses[1]) - loss.item()) < 2e-5

    assert_equal(read_hf(convert(tmp_path / "trained", tmp_path / "back")), weights)
