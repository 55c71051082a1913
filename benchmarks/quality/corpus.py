"""Text to train on, from Debian's packages and Python's library, for machines without a network too.

    python benchmarks/quality/corpus.py build corpus              # downloads with apt-get; minutes
    python benchmarks/quality/corpus.py pack corpus pieces        # pieces of at most 55 MB, each an xz file of its own
    python benchmarks/quality/corpus.py unpack corpus pieces/*    # one piece at a time or all at once

corpus/train.txt and corpus/heldout.txt hold documents of UTF-8, each ended by a zero byte; corpus/manifest.json says
which packages they are from, their versions, hashes and licences, and what was left out. The same versions of the
packages give the same bytes. 2% of the files are held out, whole. A file that repeats another one, or most of whose
lines other files before it have, is left out, whichever of the two sides either would be on.
"""

import argparse
import dataclasses
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

HELD_OUT = 0.02
END = b"\0"
# bytes of a packed piece, and of a document, beyond which a file is cut at a line's end
PIECE, DOCUMENT, DICTIONARY = 55_000_000, 1 << 18, 1 << 30
# bytes of the shortest document, and of a line on the average, beyond which a file is data
SHORTEST, LONGEST_LINE = 256, 300
# a file whose lines, by this share, were all seen before is a copy; one line in four is looked at
REPEATED, LOOKED_AT, FEWEST = 0.6, 4, 6

CODE = r"\.(c|h|S|py|go|rs|java|el|pm|pl|pod|hpp|cpp|ipp|pas|pp|inc|rb|vim|rst|txt|md|texi|dts|dtsi|sh)$"
MAN = r"/man/man\d/[^/]+$"
HTML = r"\.x?html?$"


@dataclasses.dataclass(frozen=True)
class Source:
    """A Debian package.

    Attributes:
        package: its name.
        only: pattern of the paths to read, of files in archives within it too.
        share: of its files, chosen by a hash of their paths.
        largest: bytes of a file, beyond which it is a table that a program wrote.
    """

    package: str
    only: str
    share: float = 1.0
    largest: int = 300_000


SOURCES = (
    Source("linux-source-6.1", CODE, 0.22),
    Source("golang-1.19-src", CODE),
    Source("rust-src", CODE),
    Source("openjdk-17-source", CODE, 0.5),
    Source("libboost1.81-dev", CODE, 0.4),
    Source("fpc-source-3.2.2", CODE, 0.4),
    Source("lazarus-src-2.2", CODE, 0.5),
    Source("emacs-el", CODE),
    Source("libpython3.11-stdlib", CODE),
    Source("libpython3.11-testsuite", CODE),
    Source("python3-django", CODE),
    Source("python3-sympy", CODE),
    Source("python3-scipy", CODE),
    Source("python3-numpy", CODE),
    Source("python3-matplotlib", CODE),
    Source("perl-modules-5.36", CODE),
    Source("perl-doc", CODE),
    Source("vim-runtime", CODE),
    Source("manpages", MAN),
    Source("manpages-dev", MAN),
    Source("glibc-doc", MAN),
    Source("freebsd-manpages", MAN),
    Source("python3.11-doc", HTML),
    Source("linux-doc-6.1", r"/Documentation/.*\.(rst|txt)$"),
    Source("rust-doc", r"/html/(book|reference|nomicon|rust-by-example|edition-guide|cargo|rustc|rustdoc)/.*\.html$"),
    Source("postgresql-doc-15", HTML),
    Source("git-doc", r"\.txt$"),
    Source("sqlite3-doc", HTML),
    Source("llvm-14-doc", HTML, 0.5),
    Source("cmake-doc", r"\.rst$|" + HTML),
    Source("apache2-doc", r"/en/.*\.html$"),
    Source("postfix-doc", HTML),
    Source("erlang-doc", HTML, 0.5),
    Source("gap-doc", r"\.txt$"),
    Source("octave-doc", HTML),
    Source("debian-handbook", r"/en-US/.*html$"),
    Source("debian-policy", r"\.txt(\.gz)?$"),
    Source("developers-reference", r"/developers-reference/[^/]*\.html$"),
    Source("debian-reference-en", HTML),
    Source("installation-guide-amd64", r"/en/.*\.html?$"),
    Source("libreoffice-help-en-us", HTML),
    Source("gimp-help-en", HTML),
    Source("dict-gcide", r"\.dict$", largest=DICTIONARY),
    Source("dict-foldoc", r"\.dict$", largest=DICTIONARY),
    Source("dict-jargon", r"\.dict$", largest=DICTIONARY),
    Source("wordnet-base", r"/data\.\w+$", largest=DICTIONARY),
    Source("bible-kjv-text", r"\.(txt|rawtext)$", largest=DICTIONARY),
    Source("fortunes", r"/fortunes/[\w-]+$"),
    Source("fortunes-min", r"/fortunes/[\w-]+$"),
    Source("miscfiles", r".", largest=DICTIONARY),
)


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]) / 2**64


def files_in(archive: tarfile.TarFile, chosen) -> Iterator[tuple[str, bytes]]:
    """Path and contents of the regular files of a tar archive, and of archives within it, that are `chosen`."""
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
    """Path and contents of the files of a Debian package that are `chosen`."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        yield from files_in(archive, chosen)
    if process.wait():
        raise RuntimeError(f"dpkg-deb could not read {deb}: delete it, so that it is downloaded again")


def files_of_folder(folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Relative path and contents of a folder's files, in the order of their paths."""
    # what is installed beside the standard library
    beside = {"site-packages", "dist-packages"}
    found = {path.relative_to(folder): path for path in folder.rglob(pattern)}
    for name in sorted(found):
        if found[name].is_file() and not beside & set(name.parts):
            yield name.as_posix(), found[name].read_bytes()


def plain_text(path: str, data: bytes) -> str | None:
    """A file's text, of HTML what is read; None for what is not text, or too little of it, or generated."""
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
    """The text that came before: whole files, and a quarter of their lines."""

    def __init__(self):
        self.files: set[bytes] = set()
        self.lines: set[int] = set()

    def add(self, text: str) -> str | None:
        """Take in a text; returns "exact" or "near" if it repeats others, which it then does not count among."""
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
    """A file's text in documents of at most 256 KiB that end at a line's end, each with a zero byte behind it."""
    data = text.encode()
    while data:
        end = len(data)
        if end > DOCUMENT:
            end = data.rfind(b"\n", 0, DOCUMENT) + 1
            if not end:
                # one long line: where a character begins
                end = DOCUMENT
                while data[end] & 0xC0 == 0x80:
                    end -= 1
        yield data[:end] + END
        data = data[end:]


class Writer:
    """The two sides of the corpus, and the counts of what went into them and what did not."""

    def __init__(self, out: Path):
        self.seen = Seen()
        self.sides = {name: open(out / f"{name}.txt", "wb") for name in ("train", "heldout")}

    def close(self):
        for side in self.sides.values():
            side.close()

    def add(self, source: str, files: Iterator[tuple[str, bytes]], largest: int = Source.largest) -> dict:
        """Take in the files of one source; how many files and bytes it gave, and how many were left out and why."""
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
    """A package's file in the folder, which apt-get downloads to where it is not there yet.

    Raises:
        RuntimeError: apt-get does not give it.
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
    """The licences that a package's copyright file names, or that file's first lines where it names none."""
    files = dict(files_of_package(deb, re.compile(r"/doc/[^/]+/copyright$").search))
    copyright = b"\n".join(files.values()).decode(errors="replace")
    named = sorted(set(re.findall(r"^License: *(\S.*?)\s*$", copyright, re.M)))
    return named or [" ".join(copyright.split())[:300] or "see the package that its doc folder links to"]


def build(out: Path, packages: Path, sources: tuple[Source, ...] = SOURCES) -> dict:
    """Write train.txt, heldout.txt and manifest.json into `out`; returns the manifest.

    Args:
        out: folder, made where missing.
        packages: folder of the .deb files, which are downloaded where missing.
        sources: the packages, in the order in which they are written.
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
        The pieces; the manifest goes into the folder as it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(corpus / "manifest.json", out)
    pieces = []
    # what xz may still hold back when a piece is ended
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
    """Append pieces to the corpus, in the order of their numbers; with the manifest there, check them once all are.

    Raises:
        ValueError: the text is not what was packed.
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
                    raise ValueError(f"{path} is not what was packed: delete {corpus} and unpack each piece once")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "pack", "unpack"):
        commands.add_parser(name).add_argument("corpus", type=Path)
    commands.choices["build"].add_argument("--packages", type=Path, help="folder of the .deb files: corpus/packages")
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
