import math
from collections import Counter
from pathlib import Path

import harness
import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

prepare_bytes = harness.load("examples/prepare_bytes.py")

TEXTS = {f"{folder}/{i}.txt": f"text {i} of {folder}, ümläut\n" * (i + 1) for folder in "ab" for i in range(10)}


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "source"


def documents(prefix):
    dataset = IndexedDataset(str(prefix))
    return [[int(token) for token in dataset[i]] for i in range(len(dataset))]


def as_tokens(text):
    return [*text.encode(), 256]


def test_round_trip_through_megatron(folder, tmp_path):
    train, heldout = prepare_bytes.prepare(folder, tmp_path / "out", heldout_fraction=0.2)
    read = documents(train.prefix) + documents(heldout.prefix)
    assert sorted(read) == sorted(map(as_tokens, TEXTS.values()))
    assert (train.files, heldout.files) == (16, 4)
    assert [t for d in documents(train.prefix) for t in d] == prepare_bytes.read_tokens(train.prefix).tolist()
    assert train.tokens == len(prepare_bytes.read_tokens(train.prefix))
    # what Megatron's index calls a document is one file
    assert IndexedDataset(str(train.prefix)).document_indices.tolist() == list(range(17))


def test_same_split_wherever_the_folder_is(folder, tmp_path):
    first = prepare_bytes.prepare(folder, tmp_path / "first", heldout_fraction=0.2)
    moved = folder.rename(tmp_path / "elsewhere")
    second = prepare_bytes.prepare(moved, tmp_path / "second", heldout_fraction=0.2)
    for one, other in zip(first, second, strict=True):
        for suffix in (".bin", ".idx"):
            assert Path(f"{one.prefix}{suffix}").read_bytes() == Path(f"{other.prefix}{suffix}").read_bytes()
    # not the first files by name: a fair sample
    names = sorted(TEXTS)[:4]
    assert sorted(documents(first[1].prefix)) != sorted(as_tokens(TEXTS[name]) for name in names)


def test_glob_exclude_and_what_is_not_text(folder, tmp_path):
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c.txt").write_text("hidden")
    (folder / "readme.md").write_text("markdown")
    train, heldout = prepare_bytes.prepare(folder, tmp_path / "out", glob="*.txt", exclude=("b", "0.txt"))
    read = documents(train.prefix) + documents(heldout.prefix)
    expected = [TEXTS[f"a/{i}.txt"] for i in range(1, 10)]
    assert sorted(read) == sorted(map(as_tokens, expected))


def test_max_bytes_is_exact(folder, tmp_path):
    train, heldout = prepare_bytes.prepare(folder, tmp_path / "out", max_bytes=777)
    assert train.tokens + heldout.tokens == 777 + train.files + heldout.files


def test_one_of_two_files_is_held_out(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "ab":
        (source / name).write_text(name)
    for i, fraction in enumerate((0.01, 0.99)):
        splits = prepare_bytes.prepare(source, tmp_path / str(i), heldout_fraction=fraction)
        assert [split.files for split in splits] == [1, 1]


def test_errors_name_what_to_change(folder, tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    for kwargs, message in (
        ({"folder": empty}, "no file under .*--glob"),
        ({"folder": tmp_path / "missing"}, "is not a folder"),
        ({"glob": "*.rs"}, "no file under .*--glob"),
        ({"heldout_fraction": 0.0}, "--heldout-fraction must be"),
        ({"heldout_fraction": 1.0}, "--heldout-fraction must be"),
        ({"max_bytes": 0}, "--max-bytes must be"),
        ({"max_bytes": 1}, "1 text files .* larger folder"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_bytes.prepare(**{"folder": folder, "out": out, **kwargs})
    assert not out.exists()
    prepare_bytes.prepare(folder, out)
    with pytest.raises(ValueError, match="train.bin exists: give another --out"):
        prepare_bytes.prepare(folder, out)


@pytest.mark.parametrize("add_k", [0.1, 2.0])
def test_bigram_against_counting(add_k):
    train, heldout = [*b"abracadabra", 256, *b"abc", 256], [*b"cab", 256, *b"zza", 256]
    pairs, firsts = Counter(zip(train, train[1:], strict=False)), Counter(train[:-1])
    expected = [
        -math.log2((pairs[pair] + add_k) / (firsts[pair[0]] + 257 * add_k))
        for pair in zip(heldout, heldout[1:], strict=False)
    ]
    # the dtype of a dataset, in which the product of two tokens overflows
    got = prepare_bytes.bigram_bits_per_byte(np.array(train, np.uint16), np.array(heldout, np.uint16), add_k=add_k)
    assert got == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_document_end_is_what_megatron_takes_for_it():
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    assert NullTokenizer(vocab_size=prepare_bytes.VOCAB_SIZE).eod == prepare_bytes.END_OF_DOCUMENT
