"""`python -m hgrn2_megatron patch`: one patch a Megatron release, after which `--spec hgrn2` needs no launcher.

The patches name no plugin: Megatron looks specs and arguments of installed packages up by their entry points.
docs/patches.md says what they change.
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
INSTEAD = "use the launcher, torchrun ... -m hgrn2_megatron, which needs no patch"


def find_patch(tree: Path) -> Path:
    """The patch for a Megatron-LM tree, by the release that its megatron/core/package_info.py states.

    Raises:
        UsageError: no Megatron-LM, or a release without a patch.
    """
    info = tree / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        raise UsageError(
            f"{tree} is no Megatron-LM: it has no megatron/core/package_info.py; name the checkout's folder"
        )
    stated = dict(re.findall(r"^(MAJOR|MINOR) *= *(\d+)", info.read_text(), re.MULTILINE))
    release = ".".join(stated.get(part, "?") for part in ("MAJOR", "MINOR"))
    patch = PATCHES / f"megatron-{release}.patch"
    if not patch.is_file():
        known = ", ".join(sorted(path.stem.removeprefix("megatron-") for path in PATCHES.glob("*.patch")))
        raise UsageError(f"{tree} is Megatron {release}, and there are patches for {known}: {INSTEAD}")
    return patch


def files_of(patch: Path) -> list[str]:
    """The files that a patch changes, relative to the tree."""
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)


def _git_apply(tree: Path, patch: Path, *options: str) -> subprocess.CompletedProcess:
    # the tree is taken as plain files: inside another repository git would skip them in silence
    environment = os.environ | {"GIT_DIR": os.devnull}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True)


def is_applied(tree: Path, patch: Path) -> bool:
    """Whether every hunk of a patch is in the tree.

    Raises:
        UsageError: the patch is neither applied as a whole nor can it be.
    """
    if _git_apply(tree, patch, "--check", "--reverse").returncode == 0:
        return True
    check = _git_apply(tree, patch, "--check")
    if check.returncode != 0:
        raise UsageError(
            f"{patch.name} does not match {tree}, which has other changes in {' or '.join(files_of(patch))}: "
            f"take them back, or {INSTEAD}\n{check.stderr.strip()}"
        )
    return False


def main(argv: list[str]) -> None:
    """Apply the patch for a tree, take it back, or say whether it is applied.

    Raises:
        UsageError: a tree that no patch matches, which is left as it is.
    """
    parser = argparse.ArgumentParser(prog="python -m hgrn2_megatron patch", description=__doc__.split("\n")[0])
    parser.add_argument("tree", type=Path, metavar="MEGATRON_LM", help="folder of the checkout, which holds megatron/")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing, say whether the patch is applied or can be")
    mode.add_argument("--reverse", action="store_true", help="take the patch back")
    args = parser.parse_args(argv)
    if shutil.which("git") is None:
        raise UsageError("patches are applied by git, which is not here: install it")
    patch = find_patch(args.tree)
    applied = is_applied(args.tree, patch)
    if args.check:
        print(f"{patch.name} is {'applied to' if applied else 'not applied to, and matches,'} {args.tree}")
        return
    if applied is not args.reverse:
        print(f"{patch.name} is {'already' if applied else 'not'} applied to {args.tree}: nothing to do")
        return
    done = _git_apply(args.tree, patch, *["--reverse"] * args.reverse)
    if done.returncode != 0 or is_applied(args.tree, patch) is args.reverse:
        raise UsageError(f"{args.tree} could not be changed: {done.stderr.strip() or 'check that it can be written'}")
    print(f"{patch.name} {'taken back from' if args.reverse else 'applied to'} {args.tree}:", *files_of(patch))
    if not args.reverse and "hgrn2" not in entry_points(group="megatron.extra_args").names:
        print("Megatron cannot find the plugin yet: pip install hgrn2-megatron for this Python, anew if it is there")
