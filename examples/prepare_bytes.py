"""A folder of text as Megatron datasets of bytes, and the bigram model that any network has to beat.

    python examples/prepare_bytes.py my_folder --glob '*.md' --out data

Writes data/train.{bin,idx} and data/heldout.{bin,idx}, split by file. Tokens are the bytes 0..255 and 256 at
the end of a document, as Megatron's `--tokenizer-type NullTokenizer --vocab-size 257` takes them. Without a
folder it takes the sources of Python's standard library.
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

# Megatron warns of every GPU library that is missing, and files need none
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
# what is installed beside the standard library or tests it
NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test")


@dataclass(frozen=True)
class Split:
    """One dataset on disk: its path without .bin and .idx, its files and its tokens."""

    prefix: Path
    files: int
    tokens: int


def list_files(folder: Path, glob: str = "*", exclude: Iterable[str] = ()) -> list[Path]:
    """Files under `folder` that match, in an order that depends on nothing but their relative paths.

    The order is that of a hash, so that its beginning is a fair sample: that is what `max_bytes` keeps, and
    what is held out. Hidden files and folders are left out.

    Raises:
        ValueError: no folder, or nothing in it matches.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with text files in it")
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
    """Contents of the files that are UTF-8 text and not empty, cut off where their sum is `max_bytes`."""
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
    """Write `out`/train and `out`/heldout; the same files give the same bytes on every machine.

    Args:
        folder: where the text is, searched recursively.
        out: folder to write to, made where missing.
        glob: pattern of file names.
        heldout_fraction: fraction of the files to hold out, in (0, 1); at least one file is.
        max_bytes: cap on the bytes of both together, None for no cap.
        exclude: names of files and folders to leave out.

    Returns:
        The training and the held-out split.

    Raises:
        ValueError: arguments out of range, nothing or too little to read, or a dataset already in `out`.
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
            f"{len(documents)} text files in reach in {folder}: at least one to train on and one to hold out "
            "are needed; give a larger folder or --max-bytes"
        )
    out.mkdir(parents=True, exist_ok=True)
    heldout = min(math.ceil(heldout_fraction * len(documents)), len(documents) - 1)
    return write(documents[heldout:], out / "train"), write(documents[:heldout], out / "heldout")


def write(documents: list[bytes], prefix: Path) -> Split:
    """Write one dataset, each document followed by its end token."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    for data in documents:
        tokens = np.append(np.frombuffer(data, np.uint8).astype(np.uint16), np.uint16(END_OF_DOCUMENT))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(get_idx_path(str(prefix)))
    return Split(prefix, len(documents), sum(map(len, documents)) + len(documents))


def megatron_flags(train: Split, heldout: Split) -> list[str]:
    """Megatron's flags to train and to evaluate on the two."""
    data = ["--train-data-path", str(train.prefix), "--valid-data-path", str(heldout.prefix)]
    return [*data, "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)]


def read_tokens(prefix: Path) -> np.ndarray:
    """The token stream of a dataset: [tokens] uint16, documents one after the other."""
    # documents are views of a file that is mapped while the dataset lives
    dataset = IndexedDataset(str(prefix))
    return np.concatenate(dataset[:])


def bigram_bits_per_byte(train: np.ndarray, heldout: np.ndarray, add_k: float = 0.1) -> float:
    """Held-out loss of the model that knows the previous byte only: counts of pairs, smoothed.

    Args:
        train: [tokens] integers below 257, what is counted.
        heldout: [tokens] integers below 257, what is predicted, all but its first.
        add_k: count that every pair starts with.

    Returns:
        Mean of -log2 p(token | previous token), end tokens counted like bytes.
    """
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    pairs = np.bincount(train[:-1] * VOCAB_SIZE + train[1:], minlength=VOCAB_SIZE**2)
    counts = pairs.reshape(VOCAB_SIZE, VOCAB_SIZE) + add_k
    bits = np.log2(counts.sum(1, keepdims=True)) - np.log2(counts)
    return float(bits[heldout[:-1], heldout[1:]].mean())


def describe(train: Split, heldout: Split) -> tuple[float, str]:
    """The bigram model's held-out bits per byte, and lines for people that say it and what was read."""
    bigram = bigram_bits_per_byte(read_tokens(train.prefix), read_tokens(heldout.prefix))
    lines = [f"{split.prefix}: {split.files} files, {split.tokens:,} tokens" for split in (train, heldout)]
    lines.append(f"bigram model: {bigram:.3f} bits per byte on the held-out files")
    return bigram, "\n".join(lines)


def standard_library() -> dict:
    """Arguments of `prepare` for the sources of the running Python's standard library."""
    return {"folder": Path(sysconfig.get_path("stdlib")), "glob": "*.py", "exclude": NOT_STDLIB}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default: Python's standard library, *.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two datasets to")
    parser.add_argument("--glob", help="pattern of file names, default * (*.py for the standard library)")
    parser.add_argument("--heldout-fraction", type=float, default=0.01, help="of the files")
    parser.add_argument("--max-bytes", type=int, help="stop after that many bytes")
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
