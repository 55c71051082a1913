"""The corpus as tokens of a byte-pair encoding that is learned from it, as Megatron's datasets.

    python benchmarks/quality/tokens.py corpus data [--vocab 32768]

Writes data/train and data/heldout, .bin and .idx, data/tokenizer.json, and data/data.json: how many bytes and tokens
each side has, from which a loss becomes bits per byte. The last token of the vocabulary ends a document.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from prepare_bytes import IndexedDatasetBuilder, get_bin_path, get_idx_path  # noqa: E402

# one document in so many teaches the vocabulary
SAMPLE, BATCH = 12, 2000


def documents(path: Path) -> Iterator[str]:
    """The documents of a side of the corpus, which zero bytes end."""
    rest = b""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            *whole, rest = (rest + block).split(b"\0")
            for document in whole:
                yield document.decode()


def learn(corpus: Path, vocab: int) -> Tokenizer:
    """A byte-level BPE of vocab - 1 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = (text for number, text in enumerate(documents(corpus / "train.txt")) if number % SAMPLE == 0)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def write(tokenizer: Tokenizer, source: Path, prefix: Path, end: int) -> dict[str, int]:
    """Write one side as a dataset, and count it; the tokens that end documents count as tokens."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    counts = {"documents": 0, "bytes": 0, "tokens": 0}

    def add(batch: list[str]):
        for text, encoded in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
            ids = np.append(np.array(encoded.ids, np.uint16), np.uint16(end))
            builder.add_document(ids, [len(ids)])
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            counts["tokens"] += len(ids)

    batch: list[str] = []
    for text in documents(source):
        batch.append(text)
        if len(batch) == BATCH:
            add(batch)
            batch = []
    add(batch)
    builder.finalize(get_idx_path(str(prefix)))
    return counts


def prepare(corpus: Path, out: Path, vocab: int) -> dict:
    """Write both sides into `out`; returns what data.json has.

    Raises:
        ValueError: more tokens than uint16 has, or too few for every byte to be one.
    """
    if not 258 <= vocab <= 1 << 16:
        raise ValueError(f"--vocab must be between 258 and 65536, got {vocab}")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = learn(corpus, vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    sides = {side: write(tokenizer, corpus / f"{side}.txt", out / side, vocab - 1) for side in ("train", "heldout")}
    found = {"vocab": vocab, **sides}
    (out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=32768)
    args = parser.parse_args()
    try:
        found = prepare(args.corpus, args.out, args.vocab)
    except ValueError as error:
        parser.error(str(error))
    for side in ("train", "heldout"):
        counts = found[side]
        print(f"{side}: {counts['tokens']:,} tokens, {counts['bytes'] / counts['tokens']:.2f} bytes each")


if __name__ == "__main__":
    main()
