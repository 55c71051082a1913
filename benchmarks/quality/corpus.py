"""Build a corpus from Debian's packages and Python's library, and pack it for a machine without a network.

    python benchmarks/quality/corpus.py build corpus              # downloads with apt-get; minutes
    python benchmarks/quality/corpus.py pack corpus pieces        # pieces of at most 55 MB, each an xz file of its own
    python benchmarks/quality/corpus.py unpack corpus pieces/*    # one piece at a time or all at once

corpus/train.txt and corpus/heldout.txt hold UTF-8 documents, and a zero byte ends each one. corpus/manifest.json names
the packages with their versions, hashes and licences, and counts the files that were left out. The same versions of the
packages give the same bytes.

2% of the files are held out as a whole. A file is left out if it repeats an earlier file, or if most of its lines were
in earlier files. This holds across training and held-out files.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import lzma
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from corpus_sources import HTML, SOURCES, Source

HELD_OUT = 0.02
END = b"\0"
# The most bytes of a packed piece, and of a document. Longer files are cut at the end of a line.
PIECE, DOCUMENT = 55_000_000, 1 << 18
# The fewest characters of a file, and the most characters of its average line. Files with longer lines are data.
SHORTEST, LONGEST_LINE = 256, 300
# A file is a copy if earlier files have this share of its lines. One line in LOOKED_AT counts, and at least FEWEST.
REPEATED, LOOKED_AT, FEWEST = 0.6, 4, 6


def share_of(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]) / 2**64


def files_in(archive: tarfile.TarFile, chosen) -> Iterator[tuple[str, bytes]]:
    """Yield path and contents of the `chosen` regular files of a tar archive and of the archives within it."""
    for member in archive:
        path = member.name.removeprefix("./")
        if not member.isfile():
            continue
        inner = re.sub(r"\.(gz|dz)$", "", path)
        if path.endswith((".tar.xz", ".tar.gz", ".tar.bz2")):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r|*") as packed:
                yield from files_in(packed, chosen)
        elif path.endswith("src.zip"):
            with zipfile.ZipFile(io.BytesIO(archive.extractfile(member).read())) as packed:
                for name in packed.namelist():
                    if chosen(name):
                        yield name, packed.read(name)
        elif chosen(inner):
            data = archive.extractfile(member).read()
            yield path, gzip.decompress(data) if inner != path else data


def files_of_package(deb: Path, chosen) -> Iterator[tuple[str, bytes]]:
    """Yield path and contents of the `chosen` files of a Debian package."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        yield from files_in(archive, chosen)
    if process.wait():
        raise RuntimeError(f"dpkg-deb could not read {deb}: delete it, and it is downloaded again")


def files_of_folder(folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield relative path and contents of a folder's files, in the order of their paths."""
    # Other packages are installed in these folders beside the standard library.
    beside = {"site-packages", "dist-packages"}
    found = {path.relative_to(folder): path for path in folder.rglob(pattern)}
    for name in sorted(found):
        if found[name].is_file() and not beside & set(name.parts):
            yield name.as_posix(), found[name].read_bytes()


def plain_text(path: str, data: bytes) -> str | None:
    """Return a file's text, without the tags of HTML. Return None if it is not text, too short, or generated."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if re.search(HTML, path):
        text = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>|<!--.*?-->", "", text)
        text = re.sub(r"(?i)<(/?(p|div|li|tr|h\d|pre|dt|dd|table|ul|ol|section)|br)\b[^>]*>", "\n", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\0", "")
        text = re.sub(r"\n\s*\n+", "\n\n", text)
    text = text.strip() + "\n"
    if len(text) < SHORTEST or len(text) > LONGEST_LINE * text.count("\n"):
        return None
    return text


class Seen:
    """A record of earlier text: hashes of whole files, and of a quarter of their lines."""

    def __init__(self):
        self.files: set[bytes] = set()
        self.lines: set[int] = set()

    def add(self, text: str) -> str | None:
        """Record a text and return None, or return "exact" or "near" if it repeats earlier text."""
        words = " ".join(text.split()).encode()
        whole = hashlib.blake2b(words, digest_size=16).digest()
        if whole in self.files:
            return "exact"
        self.files.add(whole)
        lines = {line.strip() for line in text.split("\n")}
        hashes = {
            int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest()) for line in lines if len(line) > 15
        }
        looked_at = {number for number in hashes if number % LOOKED_AT == 0}
        if len(looked_at) >= FEWEST and len(looked_at & self.lines) >= REPEATED * len(looked_at):
            return "near"
        self.lines |= looked_at
        return None


def documents(text: str) -> Iterator[bytes]:
    """Cut a file's text into documents of at most 256 KiB that end with a line, and yield each with a zero byte."""
    data = text.encode()
    while data:
        end = len(data)
        if end > DOCUMENT:
            end = data.rfind(b"\n", 0, DOCUMENT) + 1
            if not end:
                # A line that is too long is cut between two characters.
                end = DOCUMENT
                while data[end] & 0xC0 == 0x80:
                    end -= 1
        yield data[:end] + END
        data = data[end:]


class Writer:
    """A writer of both sides of the corpus, which leaves out repeated files and counts all files."""

    def __init__(self, out: Path):
        self.seen = Seen()
        self.sides = {name: open(out / f"{name}.txt", "wb") for name in ("train", "heldout")}

    def close(self):
        for side in self.sides.values():
            side.close()

    def add(self, source: str, files: Iterator[tuple[str, bytes]], largest: int = Source.largest) -> dict:
        """Write the files of one source, and return the numbers of files and bytes, and of files left out by reason."""
        counts = {"files": 0, "bytes": 0, "heldout_files": 0, "heldout_bytes": 0}
        dropped = {"no text": 0, "large": 0, "exact": 0, "near": 0}
        for path, data in files:
            text = plain_text(path, data)
            if text is None:
                why = "no text"
            else:
                why = "large" if len(text) > largest else self.seen.add(text)
            if why:
                dropped[why] += 1
                continue
            held_out = share_of(f"held out {source}/{path}") < HELD_OUT
            side, prefix = ("heldout", "heldout_") if held_out else ("train", "")
            written = sum(self.sides[side].write(document) - 1 for document in documents(text))
            counts[f"{prefix}files"] += 1
            counts[f"{prefix}bytes"] += written
        return {**counts, "left_out": dropped}


def download(package: str, folder: Path) -> Path:
    """Return the path of a package's file, which apt-get downloads if the folder does not have it.

    Raises:
        RuntimeError: apt-get does not find the package, or the folder has several versions of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
        found = sorted(folder.glob(f"{package}_*.deb"))
        if not found:
            raise RuntimeError(f"apt-get download {package} gave no file: {done.stderr.strip()[-500:]}")
    if len(found) > 1:
        raise RuntimeError(f"{folder} has several versions of {package}: keep one of {[path.name for path in found]}")
    return found[0]


def licences(deb: Path) -> list[str]:
    """Return the licences that a package's copyright file names, or its first lines if it names none."""
    files = dict(files_of_package(deb, re.compile(r"/doc/[^/]+/copyright$").search))
    copyright = b"\n".join(files.values()).decode(errors="replace")
    named = sorted(set(re.findall(r"^License: *(\S.*?)\s*$", copyright, re.M)))
    return named or [" ".join(copyright.split())[:300] or "see the package that its doc folder links to"]


def build(out: Path, packages: Path, sources: tuple[Source, ...] = SOURCES) -> dict:
    """Write train.txt, heldout.txt and manifest.json into `out`, and return the manifest.

    Args:
        out: folder for the corpus. It is created if it is missing.
        packages: folder of the .deb files. Missing ones are downloaded.
        sources: the packages, in the order of writing.
    """
    out.mkdir(parents=True, exist_ok=True)
    writer, manifest = Writer(out), []
    library = Path(sysconfig.get_path("stdlib"))
    entry = {"source": "python", "version": platform.python_version(), "licences": ["PSF-2.0"]}
    manifest.append(entry | writer.add("python", files_of_folder(library, "*.py")))
    print(_line(manifest[-1]), flush=True)
    for source in sources:
        deb = download(source.package, packages)
        only, name = re.compile(source.only).search, source.package

        def chosen(path: str, only=only, name=name, share=source.share) -> bool:
            return bool(only(path)) and share_of(f"{name}/{path}") < share

        version = subprocess.check_output(["dpkg-deb", "--field", str(deb), "Version"], text=True).strip()
        entry = {
            "source": name,
            "version": version,
            "sha256": hashlib.sha256(deb.read_bytes()).hexdigest(),
            "licences": licences(deb),
            "share": source.share,
        }
        manifest.append(entry | writer.add(name, files_of_package(deb, chosen), source.largest))
        print(_line(manifest[-1]), flush=True)
    writer.close()
    sides = {}
    for side in ("train", "heldout"):
        with open(out / f"{side}.txt", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sides[side] = {"bytes": (out / f"{side}.txt").stat().st_size, "sha256": digest}
    whole = {"sides": sides, "sources": manifest}
    (out / "manifest.json").write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def _line(entry: dict) -> str:
    left = ", ".join(f"{count} {why}" for why, count in entry["left_out"].items())
    return (
        f"{entry['source']} {entry['version']}: {entry['files']:,} files, {entry['bytes'] / 1e6:.1f} MB; held out "
        f"{entry['heldout_files']:,}, {entry['heldout_bytes'] / 1e6:.2f} MB; left out {left}"
    )


def pack(corpus: Path, out: Path, largest: int = PIECE) -> list[Path]:
    """Write the corpus as xz files of at most `largest` bytes, each of which unpacks without the others.

    Returns:
        The paths of the pieces. The folder also gets a copy of the manifest.
    """
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(corpus / "manifest.json", out)
    pieces = []
    # xz may still hold back this many bytes when a piece ends.
    reserve = min(2_000_000, largest // 4)
    for side in ("heldout", "train"):
        with open(corpus / f"{side}.txt", "rb") as file:
            block = file.read(reserve // 4)
            while block:
                path, xz, size = out / f"{side}.{len(pieces):02d}.xz", lzma.LZMACompressor(preset=6), 0
                with open(path, "wb") as piece:
                    while block and size < largest - reserve:
                        size += piece.write(xz.compress(block))
                        block = file.read(reserve // 4)
                    size += piece.write(xz.flush())
                assert size <= largest
                pieces.append(path)
                print(f"{path}: {size / 1e6:.1f} MB", flush=True)
    return pieces


def unpack(corpus: Path, pieces: list[Path]) -> None:
    """Append pieces to the corpus in the order of their numbers, and compare the whole with the manifest.

    The comparison needs the manifest in the corpus, and it waits until a side has all its bytes.

    Raises:
        ValueError: a side differs from the text that was packed.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    for path in sorted(pieces, key=lambda path: path.name):
        if path.suffix == ".json":
            shutil.copy(path, corpus)
            continue
        with lzma.open(path) as piece, open(corpus / f"{path.name.split('.')[0]}.txt", "ab") as side:
            shutil.copyfileobj(piece, side, 1 << 20)
    manifest = corpus / "manifest.json"
    if not manifest.exists():
        return
    for side, wanted in json.loads(manifest.read_text())["sides"].items():
        path = corpus / f"{side}.txt"
        size = path.stat().st_size if path.exists() else 0
        print(f"{path}: {size:,} of {wanted['bytes']:,} bytes")
        if size >= wanted["bytes"]:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                    raise ValueError(
                        f"{path} differs from the text that was packed: delete {corpus} and unpack each piece once"
                    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "pack", "unpack"):
        commands.add_parser(name).add_argument("corpus", type=Path)
    commands.choices["build"].add_argument(
        "--packages", type=Path, help="folder of the .deb files (default: corpus/packages)"
    )
    commands.choices["pack"].add_argument("out", type=Path)
    commands.choices["unpack"].add_argument("pieces", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        if args.command == "build":
            sides = build(args.corpus, args.packages or args.corpus / "packages")["sides"]
            print(", ".join(f"{side} {found['bytes'] / 1e6:.1f} MB" for side, found in sides.items()))
        elif args.command == "pack":
            pack(args.corpus, args.out)
        else:
            unpack(args.corpus, args.pieces)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
