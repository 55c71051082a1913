"""`python -m hgrn2_megatron convert`: from Hugging Face, in fla's format, to Megatron checkpoints and back.

Both sides are read and written tensor by tensor, with the names from weights.py and the settings from config.py.
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
# files that travel along, and the ids of special tokens
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def _write_json(path: Path, content: dict[str, Any]):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Saves tensors of which only the shape is known until each is written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def lookup_object(self, index):
        return self._read(index.fqn)


def to_megatron(source: Path, out: Path, dtype: torch.dtype | None) -> Callable[[], None]:
    """Check a Hugging Face folder, and give what writes it as a Megatron checkpoint.

    Args:
        source: with config.json and safetensors files.
        out: for `--load`; the checkpoint is its folder `release`.
        dtype: of the weights written; None keeps each one's.

    Raises:
        UsageError: nothing that can be converted; nothing has been written then.
    """
    config = read_json(source / "config.json")
    args = megatron_args(config)
    tensors = HFTensors(source, args.ffn_hidden_size)
    if not args.untie_embeddings_and_output_weights:
        # a second copy of the embeddings, which fla does not read either
        tensors.stored.pop("lm_head.weight", None)
    table = {w.name: w for w in weights(args, args.vocab_size)}
    check_tensors(source, {n: s for w in table.values() for n, s in w.parts.items()}, tensors.stored)
    plan = {}
    for w in table.values():
        kept = {tensors.stored[name][1] for name in w.parts}
        if len(kept) > 1 and dtype is None:
            raise UsageError(f"{source}: {', '.join(w.parts)} differ in dtype: give --dtype")
        plan[w.name] = torch.empty(w.shape, dtype=dtype or kept.pop(), device="meta")
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
        # Megatron takes a folder for a checkpoint once this file says so
        (out / TRACKER).write_text("release")

    return write


def to_hf(
    source: Path, out: Path, dtype: torch.dtype | None, vocab_size: int | None, max_shard_bytes: float
) -> Callable[[], None]:
    """Check a torch_dist checkpoint, and give what writes it as a Hugging Face folder.

    Args:
        source: what `--load` takes, or the folder of one iteration.
        out: for config.json and safetensors files.
        dtype: of the weights written; None keeps each one's.
        vocab_size: without Megatron's padding; None for what the checkpoint's args say.
        max_shard_bytes: of a safetensors file.

    Raises:
        UsageError: nothing that can be converted; nothing has been written then.
    """
    folder = checkpoint_folder(source)
    tensors, args = MegatronTensors(folder), read_args(folder)
    embeddings = tensors.stored.get("embedding.word_embeddings.weight")
    if embeddings is None:
        raise UsageError(f"{folder}: embedding.word_embeddings.weight is missing")
    args.padded_vocab_size = embeddings[0][0]
    vocab_size = vocab_size or getattr(args, "vocab_size", None) or args.padded_vocab_size
    if vocab_size > args.padded_vocab_size:
        raise UsageError(f"--vocab-size {vocab_size} is more than the {args.padded_vocab_size} rows of the embeddings")
    kept = tensors.stored | {name: (shape, dtype) for name, (shape, _) in tensors.stored.items() if dtype}
    tokenizer = tokenizer_folder(source, args)
    generation = tokenizer and tokenizer / "generation_config.json"
    given = read_json(generation) if generation and generation.is_file() else {}
    token_ids = {name: given.get(name, value) for name, value in TOKEN_IDS.items()}
    config = hf_config(args, vocab_size, str(kept["embedding.word_embeddings.weight"][1])[6:], token_ids)
    table = weights(args, vocab_size)
    check_tensors(folder, {w.name: w.shape for w in table}, tensors.stored)

    def write():
        out.mkdir(parents=True, exist_ok=True)
        for stale in (*out.glob("model*.safetensors"), out / INDEX, out / "config.json"):
            stale.unlink(missing_ok=True)
        files = _shards(table, kept, max_shard_bytes)
        where, total = {}, 0
        for number, shard in enumerate(files, 1):
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            content = {}
            for w in shard:
                content |= zip(w.parts, w.split(tensors.read(w.name).to(kept[w.name][1])), strict=True)
            save_file(content, out / name, metadata={"format": "pt"})
            where |= dict.fromkeys(content, name)
            total += sum(x.nbytes for x in content.values())
        if len(files) > 1:
            _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        if tokenizer:
            _copy_tokenizer(tokenizer, out)
        if not (out / "generation_config.json").is_file():
            _write_json(out / "generation_config.json", _generation(token_ids))
        _write_json(out / "config.json", config)

    return write


def _shards(table: list[Weight], stored: dict[str, tuple], limit: float) -> list[list[Weight]]:
    """The weights in order, in files of at most `limit` bytes, or of one weight."""
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
    """The folder of tokenizer files of a Megatron checkpoint: beside it, or what the args of its run name."""
    near = (source / TOKENIZER, source.parent / TOKENIZER, Path(getattr(args, "tokenizer_model", None) or ""))
    return next((path for path in near if path.is_dir() and path != Path()), None)


def _copy_tokenizer(source: Path, out: Path):
    out.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain.from_iterable(map(source.glob, TOKENIZER_FILES)):
        if path.is_file():
            shutil.copy(path, out)


def main(argv: list[str]) -> None:
    """Convert, and compare the logits of both sides.

    Raises:
        UsageError: see `to_megatron` and `to_hf`; or both sides are different models.
    """
    parser = argparse.ArgumentParser(prog="python -m hgrn2_megatron convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="Hugging Face folder, or Megatron checkpoint")
    parser.add_argument("out", type=Path, help="folder for the other one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written; the default keeps each one's")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits of both, for large models")
    parser.add_argument("--max-shard-size", type=float, default=5, metavar="GB", help="of a safetensors file")
    parser.add_argument("--vocab-size", type=int, help="tokens without Megatron's padding, where its args do not say")
    args = parser.parse_args(argv)
    if args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
        raise UsageError(f"{args.out} is not empty: name another folder, or give --overwrite")
    if args.out.resolve() == args.source.resolve():
        raise UsageError(f"{args.out} is what is to be converted: name another folder")
    # what torch and Megatron say of single processes and of each other's formats
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from_hf, dtype = (args.source / "config.json").is_file(), DTYPES.get(args.dtype)
    if from_hf:
        write = to_megatron(args.source, args.out, dtype)
    else:
        write = to_hf(args.source, args.out, dtype, args.vocab_size, args.max_shard_size * 1e9)
    write()
    print(f"{args.source} converted to {args.out}", flush=True)
    if not args.no_check:
        from hgrn2_megatron.conversion import check

        hf, megatron = (args.source, args.out) if from_hf else (args.out, args.source)
        print(check.compare(hf, megatron, dtype), flush=True)
