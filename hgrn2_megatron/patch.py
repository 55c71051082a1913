"""`python -m hgrn2_megatron patch`: patch a Megatron-LM checkout so that `--spec hgrn2` works without the launcher.

There is one patch per Megatron release. A patch does not name this plugin. It lets Megatron find the specs and
arguments of installed packages by their entry points. docs/reference/patches.md describes the changes.
"""

import argparse
import os
import re
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

from hgrn2_megatron.config import UsageError

# A wheel holds the patches in the package. A checkout holds them beside the package.
_PLACES = (Path(__file__).parent / "patches", Path(__file__).parents[1] / "patches")
PATCHES = next(filter(Path.is_dir, _PLACES), _PLACES[0])
INSTEAD = "use the launcher (torchrun ... -m hgrn2_megatron), which needs no patch"


def find_patch(tree: Path) -> Path:
    """Return the patch for a Megatron-LM tree. The tree's megatron/core/package_info.py states its release.

    Raises:
        UsageError: the folder is not Megatron-LM, or there is no patch for its release.
    """
    info = tree / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        raise UsageError(
            f"{tree} is not a Megatron-LM checkout, because it has no megatron/core/package_info.py: give the "
            "folder of a checkout"
        )
    stated = dict(re.findall(r"^(MAJOR|MINOR) *= *(\d+)", info.read_text(), re.MULTILINE))
    release = ".".join(stated.get(part, "?") for part in ("MAJOR", "MINOR"))
    patch = PATCHES / f"megatron-{release}.patch"
    if not patch.is_file():
        known = ", ".join(sorted(path.stem.removeprefix("megatron-") for path in PATCHES.glob("*.patch")))
        raise UsageError(f"{tree} is Megatron {release}, but there are patches only for {known}: {INSTEAD}")
    return patch


def files_of(patch: Path) -> list[str]:
    """Return the files that a patch changes, relative to the tree."""
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)


def _git_apply(tree: Path, patch: Path, *options: str) -> subprocess.CompletedProcess:
    # With this GIT_DIR git takes the tree as plain files. Otherwise it silently skips a tree in another repository.
    environment = os.environ | {"GIT_DIR": os.devnull}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True)


def is_applied(tree: Path, patch: Path) -> bool:
    """Return whether every hunk of a patch is applied to the tree.

    Raises:
        UsageError: the patch is not applied as a whole, and it cannot be applied.
    """
    if _git_apply(tree, patch, "--check", "--reverse").returncode == 0:
        return True
    check = _git_apply(tree, patch, "--check")
    if check.returncode != 0:
        raise UsageError(
            f"{patch.name} does not match {tree}, which has other changes in {' or '.join(files_of(patch))}: "
            f"undo them, or {INSTEAD}\n{check.stderr.strip()}"
        )
    return False


def main(argv: list[str]) -> None:
    """Apply the patch for a tree, reverse it, or print whether it is applied.

    Args:
        argv: command line after `patch`.

    Raises:
        UsageError: git is missing, no patch matches the tree, or the tree is read-only. The tree is then not changed.
    """
    parser = argparse.ArgumentParser(prog="python -m hgrn2_megatron patch", description=__doc__.split("\n")[0])
    parser.add_argument("tree", type=Path, metavar="MEGATRON_LM", help="folder of the checkout, with megatron/ in it")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="print whether the patch is applied; change nothing")
    mode.add_argument("--reverse", action="store_true", help="reverse the patch")
    args = parser.parse_args(argv)
    if shutil.which("git") is None:
        raise UsageError("git, which applies the patches, is missing: install git")
    patch = find_patch(args.tree)
    applied = is_applied(args.tree, patch)
    if args.check:
        print(f"{patch.name} is {'applied to' if applied else 'not applied to, but matches,'} {args.tree}")
        return
    if applied is not args.reverse:
        print(f"{patch.name} is {'already' if applied else 'not'} applied to {args.tree}, so there is nothing to do")
        return
    done = _git_apply(args.tree, patch, *["--reverse"] * args.reverse)
    if done.returncode != 0 or is_applied(args.tree, patch) is args.reverse:
        raise UsageError(f"{args.tree} could not be changed: {done.stderr.strip() or 'make its files writable'}")
    print(f"{patch.name} {'reversed in' if args.reverse else 'applied to'} {args.tree}:", *files_of(patch))
    if not args.reverse and "hgrn2" not in entry_points(group="megatron.extra_args").names:
        print(
            "Megatron cannot find the plugin yet: run pip install hgrn2-megatron with this Python, even if it is there "
            "already"
        )
