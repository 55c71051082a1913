"""Conversion between Hugging Face and Megatron: bits, logits, a real run in between, and what is refused."""

import argparse
import json
import shutil

import harness
import plain_hgrn2
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from training import STACK, assert_equal, train

from hgrn2_megatron import UsageError
from hgrn2_megatron.conversion import check as hf_check
from hgrn2_megatron.conversion import command as convert
from hgrn2_megatron.conversion.config import as_gpt, megatron_args
from hgrn2_megatron.conversion.files import MegatronTensors, read_args
from hgrn2_megatron.forms import gpt_name

HIDDEN, WIDTH, LAYERS, EXPAND = 64, 96, 3, 16
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 5000.0}
CONFIG = {
    "model_type": "hgrn2",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": WIDTH,
    "vocab_size": 130,
    "expand_ratio": EXPAND,
    "num_heads": None,
    "max_position_embeddings": 64,
}


def hf_weights(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of a model under fla's names, large enough to leave every linear regime."""
    generator = torch.Generator().manual_seed(1)
    d, ff, depth, vocab = (config[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    attn = config.get("attn") or {"layers": []}

    def matrix(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    def norm():
        return 1 + 0.3 * torch.randn(d, generator=generator)

    w = {"model.embeddings.weight": matrix(vocab, d), "model.norm.weight": norm()}
    if config.get("use_lower_bound", True):
        w["model.lower_bounds"] = 5 * matrix(depth, d)
    if not config.get("tie_word_embeddings", False):
        w["lm_head.weight"] = matrix(vocab, d)
    for layer in range(depth):
        shapes = {"mlp.gate": (ff, d), "mlp.up": (ff, d), "mlp.down": (d, ff), "attn.o": (d, d)}
        norms = ["attn", "mlp"]
        if layer in attn["layers"]:
            kv = d // attn["num_heads"] * attn["num_kv_heads"]
            shapes |= {"attn.q": (d, d), "attn.k": (kv, d), "attn.v": (kv, d)}
        else:
            shapes |= {f"attn.{name}": (d, d) for name in "qfi"}
            norms.append("attn.g")
        w |= {f"model.layers.{layer}.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        w |= {f"model.layers.{layer}.{name}_norm.weight": norm() for name in norms}
    return {name: x.to(dtype) for name, x in w.items()}


def write_hf(folder, weights=None, files=1, dtype=torch.float32, **changes):
    """A Hugging Face folder of CONFIG with changes, its weights in one file or several."""
    config = CONFIG | changes
    weights = hf_weights(config, dtype) if weights is None else weights
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"of": "a test"}')
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    where = {name: f"model-{n % files}.safetensors" for n, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def read_hf(folder) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def run(source, out, *flags):
    """A conversion in this process, where the check cannot run: it would switch the CPU mode on for good."""
    convert.main([str(source), str(out), "--no-check", *map(str, flags)])
    return out


def run_checked(cases):
    """Conversions with their checks, in a process of their own.

    Args:
        cases: (words of the command line, exit status, whether to swap two matrices on the way).
    """
    cases = [([*map(str, words)], *rest) for words, *rest in cases]
    done = harness.python("tests/launcher/conversions.py", json.dumps([(words, swap) for words, _, swap in cases]))
    assert done.returncode == 0, done.stdout[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [expected for _, expected, _ in cases], done.stdout[-6000:]
    wrong = sum(swap for *_, swap in cases)
    assert done.stdout.count("are different models") == wrong
    assert done.stdout.count("\nlogits of") == len(cases) - wrong


def change(checkpoint, out, by):
    """Copy a converted checkpoint, and change its tensors and args by a function."""
    shutil.copytree(checkpoint, out)
    stored, common = MegatronTensors(checkpoint / "release"), out / "release" / "common.pt"
    saved = torch.load(common, weights_only=False)
    tensors, saved["args"] = by({name: stored.read(name) for name in stored.stored}, saved["args"])
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(out / "release", overwrite=True), no_dist=True)
    torch.save(saved, common)
    return out


def as_a_gpt(tensors, args):
    """The checkpoint that a GPT would have saved."""
    return {gpt_name(name): x for name, x in tensors.items()}, as_gpt(args)


def with_mtp_head(tensors, args):
    """The checkpoint of a model with a head for multi-token prediction, under Megatron's names."""
    inner = "mtp.layers.0.mtp_model_layer.layers"
    head = {
        "mtp.layers.0.eh_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN),
        f"{inner}.0.self_attention.in_proj.weight": torch.ones(3 * HIDDEN, HIDDEN),
        f"{inner}.1.mlp.linear_fc2.weight": torch.ones(HIDDEN, WIDTH),
    }
    pattern = {"hybrid_layer_pattern": f"{args.hybrid_layer_pattern}/M-", "mtp_num_layers": 1}
    return tensors | head, argparse.Namespace(**vars(args) | pattern)


HYBRID = {"attn": ATTENTION}
MODELS = {
    "pure": {},
    "tied": {"tie_word_embeddings": True},
    "no bounds": {"use_lower_bound": False},
    "hybrid": HYBRID,
    "vocabulary that fits": {"vocab_size": 256},
    "several files": {"files": 3},
    "bf16": {"dtype": torch.bfloat16},
    "gpt": HYBRID,
    "num_heads alone": {"expand_ratio": None, "num_heads": HIDDEN // EXPAND},
}


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Folder of each model, with what it was in hf, and what became of it in megatron and back; each checked."""
    folders = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, folder in folders.items():
        write_hf(folder / "hf", **MODELS[name])
    gpt = folders["gpt"]
    change(run(gpt / "hf", gpt / "stack"), gpt / "megatron", as_a_gpt)
    there = [(folder / "hf", folder / "megatron") for name, folder in folders.items() if name != "gpt"]
    back = [(folder / "megatron", folder / "back") for folder in folders.values()]
    run_checked([(words, 0, False) for words in there + back])
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


def test_small_files_have_an_index(tmp_path):
    source = write_hf(tmp_path / "hf")
    back = run(run(source, tmp_path / "megatron"), tmp_path / "back", "--max-shard-size", 1e-4)
    where = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file.name: set(load_file(file)) for file in back.glob("*.safetensors")}
    assert len(files) > 1 and where == {name: file for file, names in files.items() for name in names}
    again = run(run(back, tmp_path / "again"), tmp_path / "whole")
    assert all(torch.equal(x, read_hf(source)[name]) for name, x in read_hf(again).items())


def test_gate_and_up_as_one_matrix_of_old_checkpoints(tmp_path):
    weights = hf_weights(CONFIG)
    old = dict(weights)
    for layer in range(LAYERS):
        gate, up = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        old[gate] = torch.cat([old[gate], old.pop(up)])
    back = run(run(write_hf(tmp_path / "old", old), tmp_path / "megatron"), tmp_path / "back")
    assert all(torch.equal(x, weights[name]) for name, x in read_hf(back).items())


def test_another_dtype(tmp_path):
    source = write_hf(tmp_path / "hf")
    there, whole = run(source, tmp_path / "megatron", "--dtype", "bf16"), run(source, tmp_path / "whole")
    halves, wholes = ((folder / "release" / "__0_0.distcp").stat().st_size for folder in (there, whole))
    assert halves < 0.7 * wholes
    back = run(there, tmp_path / "back")
    assert all(torch.equal(x, hf_weights(CONFIG)[name].bfloat16()) for name, x in read_hf(back).items())
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"
    narrow = run(whole, tmp_path / "narrow", "--dtype", "bf16")
    assert all(torch.equal(x, read_hf(back)[name]) for name, x in read_hf(narrow).items())


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "norms in fp32": torch.bfloat16}


@pytest.mark.releases
def test_the_check_knows_right_from_wrong_in_every_dtype(tmp_path):
    """Each dtype of the source, each --dtype, both directions: 0 for a right conversion, 2 for two matrices swapped."""
    there, back = [], []
    for kept, dtype in DTYPES.items():
        config = CONFIG | HYBRID | {"use_lower_bound": kept != "fp16"}
        weights = hf_weights(config, dtype)
        if kept == "norms in fp32":
            weights |= {name: x for name, x in hf_weights(config).items() if "norm" in name}
        source = write_hf(tmp_path / kept, weights, **config)
        there.append(((source, tmp_path / f"{kept} there"), 0, False))
        for flags in ((), ("--dtype", "bf16"), ("--dtype", "fp32")):
            for wrong in (False, True):
                name, status = f"{kept} {flags} {wrong}", 2 if wrong else 0
                there.append(((source, tmp_path / f"to {name}", *flags), status, wrong))
                back.append(((tmp_path / f"{kept} there", tmp_path / f"from {name}", *flags), status, wrong))
    main = run(write_hf(tmp_path / "hf", **HYBRID), tmp_path / "main")
    heads = change(main, tmp_path / "heads", with_mtp_head)
    back.append(((heads, tmp_path / "without heads", "--drop-mtp-heads"), 0, False))
    run_checked([*there, *back])


def test_the_padding_of_the_vocabulary_is_zeros(tmp_path):
    there = run(write_hf(tmp_path / "hf"), tmp_path / "megatron")
    saved = MegatronTensors(there / "release")
    for ours, theirs in (("output_layer", "lm_head"), ("embedding.word_embeddings", "model.embeddings")):
        x = saved.read(f"{ours}.weight")
        assert x.shape == (256, HIDDEN) and (x[130:] == 0).all()
        assert torch.equal(x[:130], hf_weights(CONFIG)[f"{theirs}.weight"])


def test_ids_of_special_tokens_travel(tmp_path):
    source = write_hf(tmp_path / "hf", bos_token_id=5, eos_token_id=7, pad_token_id=9)
    back = run(run(source, tmp_path / "megatron"), tmp_path / "back")
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((back / file).read_text())
        assert [ids[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [5, 7, 9]


def test_what_a_config_leaves_out_is_as_in_fla():
    args = megatron_args({"model_type": "hgrn2"})
    assert (args.hybrid_layer_pattern, args.hidden_size, args.ffn_hidden_size) == (24 * "M-", 2048, 5632)
    assert (args.vocab_size, args.padded_vocab_size, args.hgrn2_expand_ratio) == (32000, 32000, 128)
    assert args.untie_embeddings_and_output_weights and args.hgrn2_lower_bounds == "learned"
    assert megatron_args({"model_type": "hgrn2", "hidden_ratio": 3}).ffn_hidden_size == 4096


def test_the_forward_of_the_check_is_that_of_the_independent_implementation():
    weights = hf_weights(CONFIG)
    tokens = torch.randint(130, (2, 12), generator=torch.Generator().manual_seed(2))
    ours = hf_check.hf_logits(megatron_args(CONFIG), weights.__getitem__, tokens)
    harness.assert_all_close({"logits": ours}, {"logits": plain_hgrn2.logits(weights, tokens, LAYERS, EXPAND)}, 1e-5)


def test_the_check_refuses_different_logits(tmp_path, monkeypatch):
    source = write_hf(tmp_path / "hf")
    monkeypatch.setattr(hf_check, "megatron_logits", lambda folder, tokens, **_: torch.zeros(*tokens.shape, 256))
    with pytest.raises(UsageError, match="different models: logits"):
        convert.main([str(source), str(tmp_path / "out")])


TP2_PP2 = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)


# model -> layers with attention, and a pattern whose stages may end between the two layers of a pair
RUNS = {"pure": ([], "M-M|-M-"), "hybrid": ([0], "*-M-|M-")}


@pytest.mark.parametrize("model", RUNS)
def test_through_a_run_of_megatron(model, tmp_path, monkeypatch):
    """Convert there, train an iteration at learning rate 0 on TP2 x PP2, and convert back: no bit changes."""
    layers, pattern = RUNS[model]
    attn = ATTENTION | {"layers": layers} if layers else None
    source = write_hf(tmp_path / "hf", vocab_size=128, attn=attn)
    run(source, tmp_path / "megatron")

    (tmp_path / "batches").mkdir()
    monkeypatch.setenv("BATCHES", str(tmp_path / "batches"))
    parts = (*TP2_PP2, "--sequence-parallel", "--hybrid-layer-pattern", pattern)
    load = ("--load", tmp_path / "megatron", "--use-checkpoint-args", "--num-attention-heads", 4, "--vocab-size", 128)
    save = ("--save", tmp_path / "trained", "--save-interval", 1, "--train-iters", 1, "--lr", 0)
    script = "tests/launcher/keeps_batches.py"
    losses, _ = train(*STACK, *parts, *load, *save, script=script, num_processes=4)
    weights = read_hf(source)
    config = json.loads((source / "config.json").read_text())
    batches = [torch.load(tmp_path / "batches" / f"{n}.pt") for n in (1, 2)]
    tokens, labels = (torch.cat([batch[name] for batch in batches]) for name in ("tokens", "labels"))
    logits = hf_check.hf_logits(megatron_args(config), weights.__getitem__, tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(float(losses[1]) - loss.item()) < 2e-5

    assert_equal(read_hf(run(tmp_path / "trained", tmp_path / "back")), weights)


REFUSED = [
    ({"use_short_conv": True}, "use_short_conv"),
    ({"attnres_block_size": 2}, "attnres_block_size"),
    ({"hidden_act": "powlu"}, "hidden_act"),
    ({"elementwise_affine": False}, "elementwise_affine"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"expand_ratio": None, "num_heads": 3}, "num_heads"),
    ({"expand_ratio": 48}, "--hgrn2-expand-ratio 48"),
    ({"attn": ATTENTION | {"window_size": 32}}, "attn window_size"),
    ({"attn": ATTENTION | {"qk_norm": True}}, "attn qk_norm"),
    ({"attn": ATTENTION | {"qkv_bias": True}}, "attn qkv_bias"),
    ({"attn": ATTENTION | {"num_heads": 5}}, "attn num_heads"),
    ({"attn": [ATTENTION, ATTENTION | {"layers": [2], "rope_theta": 1e4}]}, "attn rope_theta"),
    ({"attn": ATTENTION | {"layers": [3]}}, "must name its layers, each below 3"),
    ({"model_type": "gla"}, "model_type"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_config_of_another_model_is_refused_by_name(changes, message, tmp_path):
    source = write_hf(tmp_path / "hf", hf_weights(CONFIG), **changes)
    with pytest.raises(UsageError, match=message):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_that_only_fuse_are_taken(tmp_path):
    fused = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "attn_mode": "fused_recurrent"}
    run(write_hf(tmp_path / "hf", **fused), tmp_path / "out")


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight is missing"),
        (lambda w: w.update({"model.layers.7.extra": torch.ones(2)}), "model.layers.7.extra has no place"),
        (
            lambda w: w.update({"model.lower_bounds": torch.ones(4, HIDDEN)}),
            r"model.lower_bounds has shape \(4, 64\), but its config requires \(3, 64\)",
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(HIDDEN).long()}), "model.norm.weight has dtype I64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, files, tmp_path):
    weights = hf_weights(CONFIG)
    change(weights)
    with pytest.raises(UsageError, match=message):
        run(write_hf(tmp_path / "hf", weights, files), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-8]), lambda file: file.unlink()])
def test_a_file_that_is_cut_off_or_missing(damage, tmp_path):
    source = write_hf(tmp_path / "hf", files=2)
    damage(source / "model-1.safetensors")
    with pytest.raises(UsageError, match=r"model-1.safetensors is (damaged or cut off|missing)"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A converted hybrid."""
    folder = tmp_path_factory.mktemp("converted")
    return run(write_hf(folder / "hf", **HYBRID), folder / "megatron")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hgrn2_norm_eps": 1e-6}, "--hgrn2-norm-eps"),
        ({"spec": None}, "--spec none"),
        ({"hybrid_layer_pattern": "M*-M--"}, r"--hybrid-layer-pattern 'M\*-M--' has no counterpart"),
        ({"mtp_num_layers": 1, "hybrid_layer_pattern": "M-*-M-/M-"}, "--mtp-num-layers is 1 .* Give --drop-mtp-heads"),
        ({"num_experts": 4, "hybrid_layer_pattern": "M-*-ME"}, "--num-experts"),
        ({"qk_layernorm": True}, "--qk-layernorm"),
        ({"add_qkv_bias": True}, "--add-qkv-bias"),
        ({"window_size": (64, 0)}, "--window-size"),
        ({"kv_channels": 32}, "--kv-channels"),
        ({"rotary_percent": 0.5}, "--rotary-percent"),
        ({"position_embedding_type": "none"}, "--position-embedding-type"),
        ({"hybrid_layer_pattern": "M-*-M-|M-"}, r"decoder.layers.6\S* is missing"),
        ({"hybrid_layer_pattern": "M-*-"}, r"decoder.layers.4\S* has no place"),
        ({"ffn_hidden_size": 32}, r"decoder.layers.1.mlp.linear_fc1.weight has shape \(192, 64\)"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_is_refused_by_name(changes, message, checkpoint, tmp_path):
    common = checkpoint / "release" / "common.pt"
    saved = torch.load(common, weights_only=False)
    try:
        torch.save(saved | {"args": argparse.Namespace(**vars(saved["args"]) | changes)}, common)
        with pytest.raises(UsageError, match=message):
            run(checkpoint, tmp_path / "out")
    finally:
        torch.save(saved, common)
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_heads_for_multi_token_prediction(checkpoint, tmp_path):
    heads = change(checkpoint, tmp_path / "heads", with_mtp_head)
    with pytest.raises(UsageError, match="Give --drop-mtp-heads"):
        run(heads, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_equal(read_hf(run(heads, tmp_path / "out", "--drop-mtp-heads")), read_hf(checkpoint.parent / "hf"))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-99]), lambda file: file.unlink()])
def test_a_checkpoint_that_is_cut_off(damage, tmp_path):
    folder = run(write_hf(tmp_path / "hf"), tmp_path / "megatron")
    damage(folder / "release" / "__0_0.distcp")
    with pytest.raises(UsageError, match=r"__0_0.distcp is missing or cut off: \S+ is not in it"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = run(write_hf(tmp_path / "again"), tmp_path / "megatron", "--overwrite")
    (folder / "release" / "common.pt").unlink()
    with pytest.raises(UsageError, match="does not describe its model"):
        run(folder, tmp_path / "out")
    (folder / "release" / ".metadata").unlink()
    with pytest.raises(UsageError, match="is not a complete checkpoint"):
        run(folder, tmp_path / "out")


def test_a_vocabulary_larger_than_the_embeddings(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--vocab-size 257"):
        run(checkpoint, tmp_path / "out", "--vocab-size", 257)


def test_the_folder_of_one_iteration_will_do(checkpoint, tmp_path):
    run(checkpoint / "release", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_is_there_is_not_overwritten(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    for source in (checkpoint, checkpoint.parent / "hf"):
        with pytest.raises(UsageError, match="not empty.*--overwrite"):
            run(source, out)
        assert [file.name for file in out.iterdir()] == ["notes"]
    run(checkpoint, out, "--overwrite", "--max-shard-size", 1e-4)
    run(checkpoint, out, "--overwrite")
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"] and (out / "notes").is_file()
    with pytest.raises(UsageError, match="is also the folder to convert"):
        run(out, out, "--overwrite")


def test_an_error_is_one_line_and_status_2(tmp_path):
    done = harness.python("-m", "hgrn2_megatron", "convert", str(tmp_path), str(tmp_path / "out"))
    errors = [line for line in done.stdout.splitlines() if line.startswith("hgrn2_megatron: error:")]
    assert done.returncode == 2 and len(errors) == 1 and "neither a Hugging Face folder" in errors[0]
