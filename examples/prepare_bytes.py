"""Turn a folder of text into Megatron datasets of bytes, and compute the loss of a bigram model as a baseline.

    python examples/prepare_bytes.py my_folder --glob '*.md' --out data

The script writes data/train.{bin,idx} and data/heldout.{bin,idx}. Each file of the folder goes into one of the two. The
tokens are the bytes 0 to 255, and token 256 ends a document. Megatron's flags for such data are
`--tokenizer-type NullTokenizer --vocab-size 257`. Without a folder, the script reads the sources of Python's standard
library.
"""

import argparse
import hashlib
import math
import sysconfig
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Megatron warns about every missing GPU library, and this script needs none of them
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
# folders beside the standard library that do not belong to it, and its tests
NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test")


@dataclass(frozen=True)
class Split:
    """One dataset on disk: its path without .bin and .idx, its number of files and its number of tokens."""

    prefix: Path
    files: int
    tokens: int


def list_files(folder: Path, glob: str = "*", exclude: Iterable[str] = ()) -> list[Path]:
    """Return the matching files under `folder`, in an order that depends only on their relative paths.

    The files are ordered by a hash of their paths, so the first files are a fair sample. `max_bytes` keeps the first
    files, and the first of these are held out. Hidden files and folders are left out.

    Raises:
        ValueError: `folder` is not a folder, or no file in it matches.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder with text files in it")
    exclude = set(exclude)
    found = {}
    for path in folder.rglob(glob):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and not exclude & set(name.parts):
            found[hashlib.sha256(name.as_posix().encode(errors="surrogateescape")).digest()] = path
    if not found:
        raise ValueError(f"no file under {folder} matches {glob!r}: give another --glob or folder")
    return [found[key] for key in sorted(found)]


def read_documents(files: list[Path], max_bytes: int | None = None) -> list[bytes]:
    """Return the contents of the files that are UTF-8 text and not empty, at most `max_bytes` bytes together."""
    documents, left = [], math.inf if max_bytes is None else max_bytes
    for path in files:
        if left <= 0:
            break
        data = path.read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        if data:
            documents.append(data[: int(min(left, len(data)))])
            left -= len(documents[-1])
    return documents


def prepare(
    folder: Path,
    out: Path,
    glob: str = "*",
    heldout_fraction: float = 0.01,
    max_bytes: int | None = None,
    exclude: Iterable[str] = (),
) -> tuple[Split, Split]:
    """Write the datasets `out`/train and `out`/heldout. The same files give the same bytes on every machine.

    Args:
        folder: folder with the text, searched recursively.
        out: folder to write to. It is created if it does not exist.
        glob: pattern of file names.
        heldout_fraction: fraction of the files to hold out, between 0 and 1. At least one file is held out.
        max_bytes: largest number of bytes of both datasets together. None sets no limit.
        exclude: names of files and folders to leave out.

    Returns:
        The training and the held-out split.

    Raises:
        ValueError: an argument is out of range, there is too little text, or `out` already has a dataset.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"--heldout-fraction must be between 0 and 1, got {heldout_fraction}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"--max-bytes must be at least 1, got {max_bytes}")
    for name in ("train", "heldout"):
        if Path(get_bin_path(str(out / name))).exists():
            raise ValueError(f"{out / name}.bin exists: give another --out, or delete it")
    documents = read_documents(list_files(folder, glob, exclude), max_bytes)
    if len(documents) < 2:
        raise ValueError(
            f"found {len(documents)} text files in {folder}, but at least two are needed, one to train on and one to "
            "hold out: give a larger folder or a larger --max-bytes"
        )
    out.mkdir(parents=True, exist_ok=True)
    heldout = min(math.ceil(heldout_fraction * len(documents)), len(documents) - 1)
    return write(documents[heldout:], out / "train"), write(documents[:heldout], out / "heldout")


def write(documents: list[bytes], prefix: Path) -> Split:
    """Write one dataset. An end token follows each document."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    for data in documents:
        tokens = np.append(np.frombuffer(data, np.uint8).astype(np.uint16), np.uint16(END_OF_DOCUMENT))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(get_idx_path(str(prefix)))
    return Split(prefix, len(documents), sum(map(len, documents)) + len(documents))


def megatron_flags(train: Split, heldout: Split) -> list[str]:
    """Return Megatron's flags to train on `train` and to evaluate on `heldout`."""
    data = ["--train-data-path", str(train.prefix), "--valid-data-path", str(heldout.prefix)]
    return [*data, "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)]


def read_tokens(prefix: Path) -> np.ndarray:
    """Return all tokens of a dataset, document after document: [tokens] uint16."""
    # documents are views of a file that stays mapped while the dataset exists
    dataset = IndexedDataset(str(prefix))
    return np.concatenate(dataset[:])


def bigram_bits_per_byte(train: np.ndarray, heldout: np.ndarray, add_k: float = 0.1) -> float:
    """Return the held-out loss of a bigram model, which predicts each token from the token before it.

    The model counts pairs of tokens in `train` and adds `add_k` to each count.

    Args:
        train: [tokens] integers below 257, the tokens to count.
        heldout: [tokens] integers below 257, the tokens to predict. The first one is not predicted.
        add_k: count that every pair starts with.

    Returns:
        The mean of -log2 p(token | previous token) in bits. End tokens count like bytes.
    """
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    pairs = np.bincount(train[:-1] * VOCAB_SIZE + train[1:], minlength=VOCAB_SIZE**2)
    counts = pairs.reshape(VOCAB_SIZE, VOCAB_SIZE) + add_k
    bits = np.log2(counts.sum(1, keepdims=True)) - np.log2(counts)
    return float(bits[heldout[:-1], heldout[1:]].mean())


def describe(train: Split, heldout: Split) -> tuple[float, str]:
    """Return the bigram model's held-out bits per byte, and a summary of the datasets to print."""
    bigram = bigram_bits_per_byte(read_tokens(train.prefix), read_tokens(heldout.prefix))
    lines = [f"{split.prefix}: {split.files} files, {split.tokens:,} tokens" for split in (train, heldout)]
    lines.append(f"bigram model: {bigram:.3f} bits per byte on the held-out files")
    return bigram, "\n".join(lines)


def standard_library() -> dict:
    """Return arguments of `prepare` for the sources of the running Python's standard library."""
    return {"folder": Path(sysconfig.get_path("stdlib")), "glob": "*.py", "exclude": NOT_STDLIB}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with the text, default Python's standard library")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two datasets to")
    parser.add_argument("--glob", help="pattern of file names, default * (*.py for the standard library)")
    parser.add_argument("--heldout-fraction", type=float, default=0.01, help="fraction of the files to hold out")
    parser.add_argument("--max-bytes", type=int, help="largest number of bytes to read, default no limit")
    args = parser.parse_args()
    source = standard_library() if args.folder is None else {"folder": args.folder}
    if args.glob is not None:
        source["glob"] = args.glob
    try:
        train, heldout = prepare(
            out=args.out, heldout_fraction=args.heldout_fraction, max_bytes=args.max_bytes, **source
        )
    except ValueError as error:
        parser.error(str(error))
    print(describe(train, heldout)[1])
    print(" ".join(megatron_flags(train, heldout)))


if __name__ == "__main__":
    main()
