"""Tensors and settings of a Hugging Face folder and of a Megatron checkpoint, read one by one and without a model."""

import argparse
import json
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
# of the one optimizer, or of several for different weights
OPTIMIZER = ("optimizer.", "chained_")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is no JSON: {error}") from error


class HFTensors:
    """The tensors of a Hugging Face folder by name, in one safetensors file or several.

    Args:
        folder: where the files are.
        width: of the channel mixer, by which a gate and its up projection in one matrix are told apart.

    Attributes:
        stored: name -> (shape, dtype).

    Raises:
        UsageError: a file is missing, cut off, or has a dtype that is no model's.
    """

    def __init__(self, folder: Path, width: int):
        index, whole = folder / INDEX, folder / "model.safetensors"
        names = sorted(set((read_json(index).get("weight_map") or {}).values())) if index.is_file() else [whole.name]
        self.stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        # name -> (file, name in it, rows)
        self._where: dict[str, tuple[Any, str, slice]] = {}
        for path in (folder / name for name in names):
            try:
                file = safe_open(path, "pt")
            except FileNotFoundError as error:
                raise UsageError(f"{path} is missing: weights are read from safetensors files alone") from error
            except SafetensorError as error:
                raise UsageError(f"{path} is damaged or cut off, get it again: {error}") from error
            for name in file.keys():
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UsageError(f"{path}: {name} has dtype {part.get_dtype()}, not one of {[*DTYPES]}")
                self.stored[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
                self._where[name] = (file, name, slice(None))
        self._split_gates(width)

    def _split_gates(self, width: int):
        """Name the halves of what fla kept as one matrix before February 2025: gate over up, under the gate's name."""
        for gate, ((rows, *rest), dtype) in list(self.stored.items()):
            up = gate.replace("gate_proj", "up_proj")
            if not gate.endswith("mlp.gate_proj.weight") or up in self.stored or rows != 2 * width:
                continue
            for name, half in ((gate, slice(width)), (up, slice(width, rows))):
                self.stored[name] = ((width, *rest), dtype)
                self._where[name] = (self._where[gate][0], gate, half)

    def read(self, name: str) -> Tensor:
        file, stored, rows = self._where[name]
        return file.get_slice(stored)[rows]


class MegatronTensors:
    """The weights of a torch_dist checkpoint by name, without the optimizer's state.

    Attributes:
        stored: name -> (shape, dtype).

    Raises:
        UsageError: a file is missing or cut off.
    """

    def __init__(self, folder: Path):
        self._reader = dcp.FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise UsageError(f"{folder} is no complete checkpoint: {error}") from error
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
                raise UsageError(f"{path} is missing or cut off: {index.fqn} is not in it")

    def read(self, name: str) -> Tensor:
        shape, dtype = self.stored[name]
        x = torch.empty(shape, dtype=dtype)
        try:
            dcp.load({name: x}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, OSError) as error:
            raise UsageError(f"{self._reader.path}: {name} cannot be read: {error}") from error
        return x


def checkpoint_folder(source: Path) -> Path:
    """The folder of the one iteration that `--load source` would take.

    Raises:
        UsageError: there is none.
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
    """The args of the run that saved a checkpoint.

    Raises:
        UsageError: it has none.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    try:
        return load_common_state_dict(str(folder))["args"]
    except (CheckpointingException, CheckpointException, KeyError) as error:
        raise UsageError(f"{folder} does not say of what model it is: it has no args of a run") from error


def check_tensors(where: Path, expected: dict[str, tuple[int, ...]], stored: dict[str, tuple]):
    """Compare the names and shapes that a model has with those that are there.

    Raises:
        UsageError: it names the first tensor that is missing, too many, or of another shape.
    """
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    for names, what in ((missing, "is missing"), (extra, "has no place in the model that its config describes")):
        if names:
            raise UsageError(f"{where}: {names[0]} {what}" + f" (and {len(names) - 1} more)" * (len(names) > 1))
    for name, shape in expected.items():
        if stored[name][0] != shape:
            raise UsageError(f"{where}: {name} has shape {stored[name][0]}, by the config it is {shape}")
