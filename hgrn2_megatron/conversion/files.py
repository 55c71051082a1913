"""Readers of Hugging Face folders and Megatron checkpoints, which read single tensors and settings without a model."""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hgrn2_megatron.config import UsageError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX, TRACKER = "model.safetensors.index.json", "latest_checkpointed_iteration.txt"
# beginnings of the names of the optimizer's tensors; with several optimizers for different weights it is the second
OPTIMIZER = ("optimizer.", "chained_")


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        UsageError: the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not valid JSON: {error}. Copy the file again") from error


class HFTensors:
    """The tensors of a Hugging Face folder by name, in one safetensors file or several.

    Args:
        folder: folder with the files.
        width: intermediate size of the channel mixer. A gate matrix of twice this height also holds the up projection.

    Attributes:
        stored: name -> (shape, dtype).

    Raises:
        UsageError: a file is missing or cut off, or has an unknown dtype.
    """

    def __init__(self, folder: Path, width: int):
        index, whole = folder / INDEX, folder / "model.safetensors"
        names = sorted(set((read_json(index).get("weight_map") or {}).values())) if index.is_file() else [whole.name]
        self.stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        # name -> (file, name in the file, rows)
        self._where: dict[str, tuple[Any, str, slice]] = {}
        for path in (folder / name for name in names):
            try:
                file = safe_open(path, "pt")
            except FileNotFoundError as error:
                raise UsageError(f"{path} is missing: weights are read from safetensors files only") from error
            except SafetensorError as error:
                raise UsageError(f"{path} is damaged or cut off, copy it again: {error}") from error
            for name in file.keys():
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UsageError(
                        f"{path}: {name} has dtype {part.get_dtype()}, it must be one of {', '.join(DTYPES)}"
                    )
                self.stored[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
                self._where[name] = (file, name, slice(None))
        self._split_gates(width)

    def _split_gates(self, width: int):
        """Split matrices that hold gate and up projection into two entries.

        Before February 2025 fla stored both as one matrix under the gate's name, with the gate in the upper half.
        """
        for gate, (shape, dtype) in list(self.stored.items()):
            up = gate.replace("gate_proj", "up_proj")
            if not gate.endswith("mlp.gate_proj.weight") or up in self.stored or shape[:1] != (2 * width,):
                continue
            for name, half in ((gate, slice(width)), (up, slice(width, 2 * width))):
                self.stored[name] = ((width, *shape[1:]), dtype)
                self._where[name] = (self._where[gate][0], gate, half)

    def read(self, name: str) -> Tensor:
        """Return one tensor, with the shape and dtype in `stored`."""
        file, stored, rows = self._where[name]
        return file.get_slice(stored)[rows]


class MegatronTensors:
    """The weights of a torch_dist checkpoint by name, without the optimizer's state.

    Args:
        folder: folder of one iteration.

    Attributes:
        stored: name -> (shape, dtype).

    Raises:
        UsageError: a file is missing or cut off.
    """

    def __init__(self, folder: Path):
        self._reader = dcp.FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{folder} is not a complete checkpoint, give another one: {error}") from error
        self.stored = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(OPTIMIZER)
        }
        for index, place in metadata.storage_data.items():
            path = folder / place.relative_path
            if not index.fqn.startswith(OPTIMIZER) and (
                not path.is_file() or path.stat().st_size < place.offset + place.length
            ):
                raise UsageError(f"{path} is missing or cut off: {index.fqn} is not in it. Copy the file again")

    def read(self, name: str) -> Tensor:
        """Return one tensor, with the shape and dtype in `stored`.

        Raises:
            UsageError: the tensor cannot be read.
        """
        shape, dtype = self.stored[name]
        x = torch.empty(shape, dtype=dtype)
        try:
            dcp.load({name: x}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, OSError) as error:
            raise UsageError(
                f"{self._reader.path}: {name} cannot be read, copy the checkpoint again: {error}"
            ) from error
        return x


def checkpoint_folder(source: Path) -> Path:
    """Return the folder of the iteration that `--load source` would take.

    Args:
        source: folder for `--load`, or the folder of one iteration.

    Raises:
        UsageError: there is no checkpoint.
    """
    tracker, folder = source / TRACKER, source
    if tracker.is_file():
        name = tracker.read_text().strip()
        folder = source / (f"iter_{int(name):07}" if name.isdecimal() else name)
    if not (folder / "metadata.json").is_file():
        raise UsageError(
            f"{folder} is neither a Hugging Face folder with config.json nor a checkpoint of --ckpt-format torch_dist"
        )
    return folder


def read_args(folder: Path) -> argparse.Namespace:
    """Return the args of the run that saved a checkpoint.

    Args:
        folder: folder of one iteration.

    Raises:
        UsageError: the checkpoint has no args.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    try:
        return load_common_state_dict(str(folder))["args"]
    except (EOFError, RuntimeError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder}: common.pt or metadata.json is damaged, copy it again: {error}") from error
    except (CheckpointingException, CheckpointException, KeyError) as error:
        raise UsageError(
            f"{folder} does not describe its model, because it has no args: give a checkpoint that a training run saved"
        ) from error


def check_tensors(where: Path, expected: dict[str, tuple[int, ...]], stored: dict[str, tuple]):
    """Compare the names and shapes of a model's tensors with the stored ones.

    Args:
        where: folder, for the error.
        expected: name -> shape of each tensor of the model.
        stored: name -> (shape, dtype) of each stored tensor.

    Raises:
        UsageError: a tensor is missing, does not belong to the model, or has another shape. The error names it.
    """
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    for names, what in ((missing, "is missing"), (extra, "has no place in the model that its config describes")):
        if names:
            raise UsageError(f"{where}: {names[0]} {what}" + f" (and {len(names) - 1} more)" * (len(names) > 1))
    for name, shape in expected.items():
        if stored[name][0] != shape:
            raise UsageError(f"{where}: {name} has shape {stored[name][0]}, but its config requires {shape}")
