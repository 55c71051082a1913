"""Divide a folder of files among pieces of at most 60 MB, and write down in each piece which files there are in all.

    python scripts/offline/pieces.py PARTS PIECES

The files are sorted so that what takes the machine longest comes first: packages, the text, and then the rest.
"""

import shutil
import sys
from pathlib import Path

LARGEST = 60_000_000
# The beginnings of names, in the order in which a machine can use them. All other files come last.
ORDER = ("base", "caches", "tokenizer", "manifest", "heldout", "train", "te", "mamba", "triton")
COMPLETE = "files.txt"


def divide(files: list[Path], largest: int = LARGEST) -> list[list[Path]]:
    """Return the files in groups that are not larger than `largest`, in the order in which they should travel.

    Raises:
        ValueError: a file alone is larger.
    """
    groups: list[list[Path]] = []
    room = 0
    for path in sorted(files, key=lambda path: (rank(path.name), path.name)):
        size = path.stat().st_size
        if size > largest:
            raise ValueError(f"{path} has {size:,} bytes, but a piece has at most {largest:,}: cut it into parts")
        if size > room:
            groups.append([])
            room = largest
        groups[-1].append(path)
        room -= size
    return groups


def rank(name: str) -> int:
    found = [place for place, beginning in enumerate(ORDER) if name.startswith(beginning)]
    return found[0] if found else len(ORDER)


def main(parts: Path, pieces: Path):
    files = [path for path in parts.iterdir() if path.is_file()]
    for number, group in enumerate(divide(files), start=1):
        folder = pieces / f"{number:02d}"
        folder.mkdir(parents=True)
        for path in group:
            shutil.copy(path, folder)
        (folder / COMPLETE).write_text("".join(f"{path.name}\n" for path in sorted(files)))
        print(
            f"{folder}: {sum(path.stat().st_size for path in group) / 1e6:.1f} MB, {', '.join(x.name for x in group)}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
