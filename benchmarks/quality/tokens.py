"""Learn a byte-pair encoding from the corpus, and write the corpus as Megatron's datasets of tokens.

    python benchmarks/quality/tokens.py corpus data [--vocab 32768] [--workers 8] [--learn-only]

The program writes the datasets data/train, data/heldout and data/heldout-sample, each as .bin and .idx, and the
vocabulary data/tokenizer.json. data/data.json has the bytes and tokens of each dataset, with which a loss is converted
to bits per byte. The last token of the vocabulary ends a document.

The sample has about a fourth of the held-out documents, and runs are evaluated on it while they train. A hash of a
document's text decides whether the sample has it. So the sample stays almost the same when a newer package changes a
few documents of the corpus.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing.pool
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from prepare_bytes import IndexedDatasetBuilder, get_bin_path, get_idx_path  # noqa: E402

# The vocabulary is learned from about one document in 12. The sample has about one held-out document in 4.
SAMPLE, HELDOUT_SAMPLE = 12, 4
# A process encodes this many documents at a time.
BATCH = 100
# For each dataset: the side of the corpus, and a number n where it takes about one document in n.
DATASETS = {"train": ("train", 1), "heldout": ("heldout", 1), "heldout-sample": ("heldout", HELDOUT_SAMPLE)}


def documents(path: Path) -> Iterator[str]:
    """Yield the documents of a side of the corpus, each of which a zero byte ends."""
    rest = b""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            *whole, rest = (rest + block).split(b"\0")
            for document in whole:
                yield document.decode()


def sample(path: Path, every: int) -> Iterator[str]:
    """Yield the first document of a side of the corpus, and about one in `every` of the others, by a hash."""
    for number, text in enumerate(documents(path)):
        if every == 1 or number == 0 or int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % every == 0:
            yield text


def learn(corpus: Path, vocab: int) -> Tokenizer:
    """Learn a byte-level BPE of vocab - 1 tokens. The same corpus gives the same vocabulary."""
    # several threads would break ties between pairs of tokens by chance
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sample(corpus / "train.txt", SAMPLE), trainer)
    return tokenizer


def start_worker(path: str):
    """Load the tokenizer in a process of its own with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global tokenizer_of_worker
    tokenizer_of_worker = Tokenizer.from_file(path)


def encode(texts: list[str]) -> tuple[int, list[np.ndarray]]:
    """Return the bytes and the tokens of some documents, each with the token that ends it."""
    end = np.uint16(tokenizer_of_worker.get_vocab_size())
    encoded = tokenizer_of_worker.encode_batch_fast(texts)
    ids = [np.append(np.array(one.ids, np.uint16), end) for one in encoded]
    return sum(len(text.encode()) for text in texts), ids


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, BATCH)):
        yield batch


def write(pool: multiprocessing.pool.Pool, source: Path, prefix: Path, every: int = 1) -> dict[str, int]:
    """Write a sample of the documents as a dataset, and return counts that include the tokens that end documents."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    counts = {"documents": 0, "bytes": 0, "tokens": 0}
    for size, encoded in pool.imap(encode, batches(sample(source, every))):
        for ids in encoded:
            builder.add_document(ids, [len(ids)])
        counts["documents"] += len(encoded)
        counts["bytes"] += size
        counts["tokens"] += sum(map(len, encoded))
    builder.finalize(get_idx_path(str(prefix)))
    return counts


def vocabulary(corpus: Path, out: Path, vocab: int) -> Path:
    """Return the path of tokenizer.json in `out`. It is learned if it is missing.

    Raises:
        ValueError: the vocabulary does not fit into uint16, or has fewer tokens than there are bytes, or differs from
            that of an existing tokenizer.json.
    """
    if not 258 <= vocab <= 1 << 16:
        raise ValueError(f"--vocab must be between 258 and 65536, got {vocab}")
    out.mkdir(parents=True, exist_ok=True)
    learned = out / "tokenizer.json"
    if not learned.exists():
        learn(corpus, vocab).save(str(learned))
    has = Tokenizer.from_file(str(learned)).get_vocab_size() + 1
    if has != vocab:
        raise ValueError(f"{learned} has {has} tokens with the one that ends documents, not {vocab}: delete it")
    return learned


def prepare(corpus: Path, out: Path, vocab: int, workers: int) -> dict:
    """Write the vocabulary and the datasets into `out` and return the contents of data.json.

    Raises:
        ValueError: see `vocabulary`.
    """
    learned, found = vocabulary(corpus, out, vocab), {"vocab": vocab}
    with multiprocessing.Pool(workers, start_worker, (str(learned),)) as pool:
        for name, (side, every) in DATASETS.items():
            found[name] = write(pool, corpus / f"{side}.txt", out / name, every)
    (out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that encode")
    parser.add_argument("--learn-only", action="store_true", help="write tokenizer.json and no datasets")
    args = parser.parse_args()
    try:
        if args.learn_only:
            print(vocabulary(args.corpus, args.out, args.vocab))
            return
        found = prepare(args.corpus, args.out, args.vocab, args.workers)
    except ValueError as error:
        parser.error(str(error))
    for name in DATASETS:
        counts = found[name]
        print(f"{name}: {counts['tokens']:,} tokens, {counts['bytes'] / counts['tokens']:.2f} bytes each")


if __name__ == "__main__":
    main()
