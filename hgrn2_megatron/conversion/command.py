"""Convert between Hugging Face folders in fla's format and Megatron checkpoints.

This is the command `python -m hgrn2_megatron convert`. Both sides are read and written tensor by tensor. The names of
the weights are in weights.py, and the settings of the model are in config.py.
"""

import argparse
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from hgrn2_megatron.config import UsageError
from hgrn2_megatron.conversion.config import hf_config, megatron_args
from hgrn2_megatron.conversion.files import (
    INDEX,
    TRACKER,
    HFTensors,
    MegatronTensors,
    check_tensors,
    checkpoint_folder,
    read_args,
    read_json,
)
from hgrn2_megatron.conversion.weights import Weight, weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENIZER = "tokenizer"
# files of the tokenizer, which are copied
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)
# beginning of the names of the weights of heads for multi-token prediction
MTP = "mtp."
# ids of special tokens, with fla's defaults
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def _write_json(path: Path, content: dict[str, Any]):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Save planner that reads each tensor only when it is written. Until then only its shape and dtype are known."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def lookup_object(self, index):
        return self._read(index.fqn)


def to_megatron(source: Path, out: Path, dtype: torch.dtype | None) -> Callable[[], None]:
    """Check a Hugging Face folder, and return a function that writes it as a Megatron checkpoint of a HybridModel.

    Args:
        source: folder with config.json and safetensors files.
        out: folder for `--load`. The checkpoint itself is its subfolder `release`.
        dtype: dtype of the weights to write; None keeps the dtype of each weight.

    Returns:
        A function without arguments that writes the checkpoint. Nothing is written before.

    Raises:
        UsageError: the folder cannot be converted.
    """
    config = read_json(source / "config.json")
    args = megatron_args(config)
    tensors = HFTensors(source, args.ffn_hidden_size)
    if not args.untie_embeddings_and_output_weights:
        # This would be a second copy of the embeddings, which fla does not read either.
        tensors.stored.pop("lm_head.weight", None)
    table = {w.name: w for w in weights(args, args.vocab_size)}
    check_tensors(source, {n: s for w in table.values() for n, s in w.parts.items()}, tensors.stored)
    plan = {}
    for w in table.values():
        dtypes = {tensors.stored[name][1] for name in w.parts}
        if len(dtypes) > 1 and dtype is None:
            raise UsageError(
                f"{source}: {', '.join(w.parts)} become one tensor, but have the dtypes "
                f"{', '.join(sorted(map(str, dtypes)))}: give --dtype"
            )
        plan[w.name] = torch.empty(w.shape, dtype=dtype or dtypes.pop(), device="meta")
    args.bf16, args.fp16 = (
        plan["embedding.word_embeddings.weight"].dtype is t for t in (torch.bfloat16, torch.float16)
    )

    def read(name: str) -> Tensor:
        return table[name].merge([tensors.read(part) for part in table[name].parts]).to(plan[name].dtype)

    def write():
        (out / TRACKER).unlink(missing_ok=True)
        shutil.rmtree(out / "release", ignore_errors=True)
        folder = out / "release"
        folder.mkdir(parents=True)
        dcp.save(plan, storage_writer=dcp.FileSystemWriter(folder), planner=_ReadWhenWritten(read), no_dist=True)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
        _write_json(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        _copy_tokenizer(source, out / TOKENIZER)
        generation = out / TOKENIZER / "generation_config.json"
        if not generation.is_file():
            _write_json(generation, _generation({name: config.get(name, value) for name, value in TOKEN_IDS.items()}))
        # Megatron accepts the folder only with this file, so it is written last.
        (out / TRACKER).write_text("release")

    return write


def to_hf(
    source: Path,
    out: Path,
    dtype: torch.dtype | None,
    vocab_size: int | None,
    max_shard_bytes: float,
    drop_mtp_heads: bool,
) -> Callable[[], None]:
    """Check a torch_dist checkpoint, and return a function that writes it as a Hugging Face folder.

    Args:
        source: folder that `--load` takes, or the folder of one iteration.
        out: folder for config.json and safetensors files.
        dtype: dtype of the weights to write; None keeps the dtype of each weight.
        vocab_size: number of tokens without Megatron's padding; None takes it from the checkpoint's args.
        max_shard_bytes: largest size of a safetensors file in bytes. A larger weight gets a file of its own.
        drop_mtp_heads: whether to leave out heads for multi-token prediction. They own no weight of the main model.

    Returns:
        A function without arguments that writes the folder. Nothing is written before.

    Raises:
        UsageError: the checkpoint cannot be converted.
    """
    folder = checkpoint_folder(source)
    tensors, args = MegatronTensors(folder), read_args(folder)
    embeddings = tensors.stored.get("embedding.word_embeddings.weight")
    if embeddings is None:
        raise UsageError(
            f"{folder}: embedding.word_embeddings.weight is missing: give a checkpoint of a model with HGRN2 layers"
        )
    if drop_mtp_heads:
        args.mtp_num_layers = None
        tensors.stored = {name: entry for name, entry in tensors.stored.items() if not name.startswith(MTP)}
    args.padded_vocab_size = embeddings[0][0]
    vocab_size = vocab_size or getattr(args, "vocab_size", None) or args.padded_vocab_size
    if vocab_size > args.padded_vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size} is larger than the embeddings of the checkpoint: give at most "
            f"{args.padded_vocab_size}"
        )
    entries = tensors.stored | {name: (shape, dtype) for name, (shape, _) in tensors.stored.items() if dtype}
    tokenizer = tokenizer_folder(source, args)
    generation = tokenizer and tokenizer / "generation_config.json"
    given = read_json(generation) if generation and generation.is_file() else {}
    token_ids = {name: given.get(name, value) for name, value in TOKEN_IDS.items()}
    config = hf_config(args, vocab_size, str(entries["embedding.word_embeddings.weight"][1])[6:], token_ids)
    table = weights(args, vocab_size)
    check_tensors(folder, {w.name: w.shape for w in table}, tensors.stored)

    def write():
        out.mkdir(parents=True, exist_ok=True)
        for stale in (*out.glob("model*.safetensors"), out / INDEX, out / "config.json"):
            stale.unlink(missing_ok=True)
        files = _shards(table, entries, max_shard_bytes)
        weight_map, total = {}, 0
        for number, shard in enumerate(files, 1):
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            content = {}
            for w in shard:
                content |= zip(w.parts, w.split(tensors.read(w.name).to(entries[w.name][1])), strict=True)
            save_file(content, out / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(content, name)
            total += sum(x.nbytes for x in content.values())
        if len(files) > 1:
            _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if tokenizer:
            _copy_tokenizer(tokenizer, out)
        if not (out / "generation_config.json").is_file():
            _write_json(out / "generation_config.json", _generation(token_ids))
        _write_json(out / "config.json", config)

    return write


def _shards(table: list[Weight], stored: dict[str, tuple], limit: float) -> list[list[Weight]]:
    """Divide the weights in order into files of at most `limit` bytes each. A larger weight gets a file of its own."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for w in table:
        shape, dtype = stored[w.name]
        added = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and size + added > limit:
            shards.append([])
            size = 0
        shards[-1].append(w)
        size += added
    return shards


def _generation(token_ids: dict[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True} | {name: value for name, value in token_ids.items() if value is not None}


def tokenizer_folder(source: Path, args: argparse.Namespace) -> Path | None:
    """Return the folder with the tokenizer files of a Megatron checkpoint, or None if there is none.

    It is next to the checkpoint, or named in the args of the run.
    """
    candidates = (source / TOKENIZER, source.parent / TOKENIZER, Path(getattr(args, "tokenizer_model", None) or ""))
    return next((path for path in candidates if path.is_dir() and path != Path()), None)


def _copy_tokenizer(source: Path, out: Path):
    out.mkdir(parents=True, exist_ok=True)
    if out.samefile(source):
        return
    for path in itertools.chain.from_iterable(map(source.glob, TOKENIZER_FILES)):
        if path.is_file():
            shutil.copy(path, out)


def main(argv: list[str]) -> None:
    """Convert a folder, and compare the logits of both sides.

    Args:
        argv: arguments of the command.

    Raises:
        UsageError: the source cannot be converted, the output folder cannot be used, or the logits differ.
    """
    parser = argparse.ArgumentParser(prog="python -m hgrn2_megatron convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder to convert: a Hugging Face folder or a Megatron checkpoint")
    parser.add_argument("out", type=Path, help="folder to write, in the other format")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights to write; the default keeps the dtype of each weight"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the logits of both sides, which takes long for a large model",
    )
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=5,
        metavar="GB",
        help="largest size of a safetensors file in GB; default 5",
    )
    parser.add_argument(
        "--vocab-size", type=int, help="number of tokens without Megatron's padding, if the checkpoint does not tell it"
    )
    parser.add_argument(
        "--drop-mtp-heads",
        action="store_true",
        help="leave out the heads for multi-token prediction, which Hugging Face's format has no place for",
    )
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
        raise UsageError(f"{args.out} is not empty: give another folder, or --overwrite")
    from_hf, dtype = (args.source / "config.json").is_file(), DTYPES.get(args.dtype)
    source, out = args.source.resolve(), args.out.resolve()
    if source == out:
        raise UsageError(f"{args.out} is also the folder to convert: give another output folder")
    if from_hf and out / "release" in (source, *source.parents):
        raise UsageError(f"{args.source} would be replaced by the new checkpoint: give another output folder")
    if args.vocab_size is not None and args.vocab_size < 1:
        raise UsageError(f"--vocab-size is {args.vocab_size}: give the number of tokens, at least 1")
    if not args.max_shard_size > 0:
        raise UsageError(f"--max-shard-size is {args.max_shard_size}: give a number of GB above 0")
    # torch and Megatron warn about single processes and about each other's formats.
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if from_hf:
        write = to_megatron(args.source, args.out, dtype)
    else:
        shard_bytes = args.max_shard_size * 1e9
        write = to_hf(args.source, args.out, dtype, args.vocab_size, shard_bytes, args.drop_mtp_heads)
    write()
    print(f"Converted {args.source} to {args.out}.", flush=True)
    if not args.no_check:
        from hgrn2_megatron.conversion import check

        hf, megatron = (args.source, args.out) if from_hf else (args.out, args.source)
        print(check.compare(hf, megatron, dtype), flush=True)
