"""Small models in fla's format, and their conversion in this process or, with its check, in another one."""

import argparse
import json
import shutil

import harness
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from hgrn2_megatron import UsageError
from hgrn2_megatron.conversion import command
from hgrn2_megatron.conversion.files import MegatronTensors

HIDDEN, WIDTH, LAYERS, EXPAND = 64, 96, 3, 16
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 5000.0}
HYBRID = {"attn": ATTENTION}
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
    """Return the weights of a model under fla's names, large enough to leave every linear regime."""
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
    """Write a Hugging Face folder of CONFIG with changes, with its weights in one file or several."""
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
    """Return the weights of a Hugging Face folder."""
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def convert(source, out, *flags):
    """Convert a folder in this process, where the check cannot run: it would switch the CPU mode on for good."""
    command.main([str(source), str(out), "--no-check", *map(str, flags)])
    return out


def assert_refused(message, source, out, *flags):
    """Assert that a conversion stops with an error that matches a message, and writes nothing."""
    with pytest.raises(UsageError, match=message):
        convert(source, out, *flags)
    assert not out.exists()


def convert_checked(cases):
    """Convert folders in a process of its own, each with the check, which must find the wrong conversions alone.

    Args:
        cases: (words of the command line, whether to swap two matrices on the way).
    """
    cases = [([*map(str, words)], wrong) for words, wrong in cases]
    done = harness.python("tests/conversion/conversions.py", json.dumps(cases))
    assert done.returncode == 0, done.stdout[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [2 if wrong else 0 for _, wrong in cases], done.stdout[-6000:]
    num_wrong = statuses.count(2)
    assert done.stdout.count("are different models") == num_wrong
    assert done.stdout.count("\nlogits of") == len(cases) - num_wrong


def change(checkpoint, out, by):
    """Copy a converted checkpoint, and change its tensors and args by a function."""
    shutil.copytree(checkpoint, out)
    stored, common = MegatronTensors(checkpoint / "release"), out / "release" / "common.pt"
    saved = torch.load(common, weights_only=False)
    tensors, saved["args"] = by({name: stored.read(name) for name in stored.stored}, saved["args"])
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(out / "release", overwrite=True), no_dist=True)
    torch.save(saved, common)
    return out


def with_mtp_head(tensors, args):
    """Return tensors and args with a head for multi-token prediction added, under Megatron's names."""
    inner = "mtp.layers.0.mtp_model_layer.layers"
    head = {
        "mtp.layers.0.eh_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN),
        f"{inner}.0.self_attention.in_proj.weight": torch.ones(3 * HIDDEN, HIDDEN),
        f"{inner}.1.mlp.linear_fc2.weight": torch.ones(HIDDEN, WIDTH),
    }
    pattern = {"hybrid_layer_pattern": f"{args.hybrid_layer_pattern}/M-", "mtp_num_layers": 1}
    return tensors | head, argparse.Namespace(**vars(args) | pattern)
