"""The corpus: what counts as text and as a copy, and what comes back out of packed pieces."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.append(str(FOLDER))

import corpus  # noqa: E402


def lines(count: int, seed: int) -> str:
    """So many lines of text, all different."""
    words = random.Random(seed)
    return "".join(f"line {n}: {words.getrandbits(64):x} {words.getrandbits(64):x}\n" for n in range(count))


def test_html_is_what_is_read():
    page = "<html><head><title>no</title></head><body><p>a &lt; b</p><script>no()</script><p>" + "word " * 60 + "</p>"
    text = corpus.plain_text("page.html", page.encode())
    assert text.startswith("a < b\n") and "no" not in text
    assert corpus.plain_text("page.txt", page.encode()) is None, "one long line"


@pytest.mark.parametrize("data", [b"short", b"\xff" * 500, b"a\0b\n" * 500, b"x" * 5000])
def test_what_is_not_text_is_left_out(data):
    assert corpus.plain_text("file.c", data) is None


def test_copies_are_found():
    seen, text = corpus.Seen(), lines(200, seed=1)
    assert seen.add(text) is None
    assert seen.add(text.replace("\n", "\n\n  ")) == "exact"
    changed = text.split("\n")
    changed[10:40] = lines(30, seed=2).split("\n")
    assert seen.add("\n".join(changed)) == "near"
    # what has half of its lines of its own is another text
    assert seen.add("\n".join([*text.split("\n")[:100], lines(150, seed=3)])) is None


def test_long_files_are_cut_at_lines():
    text = lines(12000, seed=4) + "ä" * 300000
    parts = list(corpus.documents(text))
    assert len(parts) > 3 and all(part.endswith(b"\0") and len(part) <= corpus.DOCUMENT + 1 for part in parts)
    assert b"".join(part[:-1] for part in parts).decode() == text
    [part.decode() for part in parts]


@pytest.fixture
def package(tmp_path):
    """A Debian package of 300 files, three of which repeat others."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: some-text\nVersion: 1.2-3\nArchitecture: all\nMaintainer: n <n@n>\nDescription: text\n"
    )
    doc = root / "usr/share/doc/some-text"
    doc.mkdir(parents=True)
    (doc / "table.txt").write_text(lines(20_000, seed=5000))
    (doc / "copyright").write_text("Files: *\nLicense: MIT\n\nFiles: x\nLicense: GPL-2+\n")
    for n in range(300):
        (doc / f"{n}.txt").write_text(lines(400, seed=n if n < 297 else 0))
    packages = tmp_path / "packages"
    packages.mkdir()
    command = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(packages / "some-text_1.2-3_all.deb")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return packages


def test_a_corpus_is_built_packed_and_unpacked(package, tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    (library / "module.py").write_text(lines(30, seed=1000))
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
    sources = (corpus.Source("some-text", r"\.txt$"),)
    built = corpus.build(tmp_path / "corpus", package, sources)
    assert built == json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    python, entry = built["sources"]
    assert python["files"] + python["heldout_files"] == 1
    assert (entry["version"], entry["licences"]) == ("1.2-3", ["GPL-2+", "MIT"])
    assert entry["files"] + entry["heldout_files"] == 297 and entry["left_out"]["exact"] == 3
    assert entry["left_out"]["large"] == 1
    assert 0 < entry["heldout_files"] < 20
    train, heldout = ((tmp_path / "corpus" / f"{side}.txt").read_bytes() for side in ("train", "heldout"))
    assert not set(train.split(b"\0")[:-1]) & set(heldout.split(b"\0")[:-1])
    assert train.count(b"\0") == python["files"] + entry["files"]
    again = corpus.build(tmp_path / "again", package, sources)
    assert again == built

    # a cap that makes several pieces of it
    pieces = corpus.pack(tmp_path / "corpus", tmp_path / "pieces", largest=1_000_000)
    assert len(pieces) > 2 and all(piece.stat().st_size <= 1_000_000 for piece in pieces)
    corpus.unpack(tmp_path / "there", [tmp_path / "pieces" / "manifest.json"])
    for piece in pieces:
        corpus.unpack(tmp_path / "there", [piece])
    assert (
        hashlib.sha256((tmp_path / "there" / "train.txt").read_bytes()).hexdigest() == built["sides"]["train"]["sha256"]
    )
    with pytest.raises(ValueError, match="unpack each piece once"):
        corpus.unpack(tmp_path / "there", pieces[-1:])
