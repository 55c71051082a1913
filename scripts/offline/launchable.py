"""Delete from Triton caches what a launch does not need: the sources, and all forms of a kernel but the last.

python scripts/offline/launchable.py CACHE ...
"""

import json
import sys
from pathlib import Path


def reduce(cache: Path) -> int:
    """Delete what is not needed, and return the number of files deleted."""
    deleted = 0
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        needed = {name: path for name, path in paths.items() if name.endswith((".cubin", ".json"))}
        for name in paths.keys() - needed.keys():
            (group.parent / name).unlink(missing_ok=True)
            deleted += 1
        group.write_text(json.dumps({"child_paths": needed}))
    return deleted


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(f"{folder}: deleted {reduce(Path(folder))} files")
