"""Make a patched tree of Megatron, and run scripts on it without the launcher."""

import os
import shutil
from pathlib import Path

import torch

from hgrn2_megatron import patch

ALONE = ("tests/launcher/cpu_mode_alone.py",)
# Flags that the launcher sets for the user on a machine without a GPU.
CPU = "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion --no-rope-fusion"
CPU = () if torch.cuda.is_available() else (*CPU.split(), "--no-persist-layer-norm")


def patched_copy(megatron: Path, folder: Path) -> Path:
    """Make a patched tree in `folder`, whose other files are links to the files of `megatron`, and return it."""
    shutil.copytree(megatron / "megatron", folder / "megatron", copy_function=os.symlink)
    for script in megatron.glob("*.py"):
        (folder / script.name).symlink_to(script)
    for name in patch.files_of(patch.find_patch(megatron)):
        (folder / name).unlink()
        shutil.copy(megatron / name, folder / name)
    patch.main([str(folder)])
    return folder
