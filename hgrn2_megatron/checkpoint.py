"""Load weights from checkpoints of the other form of a model, of attention models and of other implementations.

Megatron loads a distributed checkpoint by a dict of the entries that it wants. This module renames each entry that has
another name in the checkpoint. It removes each entry that does not exist in the checkpoint, or that means something
else there. The weights of a removed entry keep their initial values.
"""

import argparse
import copy
import dataclasses
import re

import torch
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

from hgrn2_megatron.arguments import is_hgrn2_spec
from hgrn2_megatron.config import HGRN2, MIXERS, STACK_MIXERS, HGRN2Config
from hgrn2_megatron.forms import Layers, gpt_name, stack_name

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
HEADS = "mtp."


def adapt(
    args: argparse.Namespace, wanted: dict, checkpoint_args: argparse.Namespace, checkpoint: str
) -> argparse.Namespace:
    """Adapt Megatron's dict of wanted entries to the entries that a distributed checkpoint has.

    Args:
        args: Megatron's args of this run, already checked against the args of the checkpoint.
        wanted: sharded state dict of the model and of everything else that Megatron loads; changed in place.
        checkpoint_args: args of the run that saved the checkpoint.
        checkpoint: folder of the checkpoint.

    Returns:
        Args with which Megatron must load the checkpoint.
    """
    from_attention = not is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    same_modules = getattr(checkpoint_args, "transformer_impl", args.transformer_impl) == args.transformer_impl
    here, saved = Layers.of(args), Layers.of(checkpoint_args)
    fresh_heads = bool(here.heads) and (from_attention or not here.same_heads(saved))
    if not from_attention and same_modules and here.stack == saved.stack and not fresh_heads:
        return args
    # by name; load_sharded_metadata of megatron-core 0.19 fails with torch 2.15
    stored = _get_filesystem_reader(checkpoint).read_metadata().state_dict_metadata
    fresh = [HEADS] if fresh_heads else []
    if fresh_heads and torch.distributed.get_rank() == 0:
        print(f"HGRN2: the heads for multi-token prediction, {here.heads}, start fresh", flush=True)
    if from_attention:
        args, keys = _from_attention(args, here)
        fresh += keys
    stacked = not any(LAYER.match(key) for key in stored)
    rename = {(True, False): gpt_name, (False, True): stack_name}.get((here.stack, saved.stack), str)

    def adapt_entry(entry):
        if not isinstance(entry, ShardedBase):
            return entry
        if entry.key.startswith(tuple(fresh)):
            return _keep(entry)
        entry = dataclasses.replace(entry, key=rename(entry.key))
        layer = LAYER.match(entry.key)
        if layer and stacked:
            entry = _layer_of_stack(entry, layer, len(saved.symbols) // 2)
        extra_state = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        # A checkpoint of Megatron's own modules has no FP8 states of Transformer Engine.
        return _keep(entry) if extra_state and entry.unique_key not in stored else entry

    dict_list_map_inplace(adapt_entry, wanted)
    return args


def _keep(entry: ShardedBase) -> LocalNonpersistentObject:
    """Return a replacement for an entry of the dict of wanted entries. Megatron keeps its value and loads nothing."""
    return LocalNonpersistentObject(entry.data)


def _from_attention(args: argparse.Namespace, here: Layers) -> tuple[argparse.Namespace, list[str]]:
    """Print what will be loaded from an attention checkpoint, and return what Megatron must know to load it.

    Returns:
        A copy of `args` with which Megatron can load the entries, and the first parts of the names of all entries that
        keep their initial values.
    """
    fresh = [layer for layer, symbol in enumerate(here.symbols) if MIXERS.get(symbol) == HGRN2]
    if not here.stack:
        fresh = [layer // 2 for layer in fresh]
    mixers = sum(symbol in STACK_MIXERS for symbol in here.symbols)
    bounds = "the lower bounds, " if HGRN2Config.of(args).lower_bounds == "learned" else ""
    if torch.distributed.get_rank() == 0:
        print(
            f"HGRN2: loading {mixers - len(fresh)} of {mixers} mixers and all other shared weights from an attention "
            f"checkpoint; starting fresh: the mixers of layers {', '.join(str(n + 1) for n in fresh)} with their input "
            f"norms, {bounds}the optimizer",
            flush=True,
        )
    # Megatron checks that the ranks together read every part of an entry. No rank reads the attention of HGRN2 layers.
    args = copy.copy(args)
    args.ckpt_load_validate_sharding_integrity = False
    return args, [*(f"decoder.layers.{layer}.self_attention." for layer in fresh), "decoder.hgrn2_bounds."]


def _layer_of_stack(entry: ShardedBase, layer: re.Match, num_layers: int) -> ShardedBase:
    """Return an entry that loads one layer from a checkpoint in which each tensor stacks all layers.

    The first axis of such a tensor counts the layers. Megatron's own entries for such tensors expect the run to load
    all layers. The entry here treats the first axis like any other axis, and loads a slice of length 1 along it.

    Args:
        entry: the entry of one layer, as the model wants it.
        layer: match of LAYER in the entry's key.
        num_layers: number of layers in the checkpoint.
    """
    key, index = f"decoder.layers.{entry.key[layer.end() :]}", int(layer[1])
    if isinstance(entry, ShardedObject):
        unsharded = entry.global_shape == (1,)
        shape, offset = ((), ()) if unsharded else (entry.global_shape, entry.global_offset)
        return dataclasses.replace(entry, key=key, global_shape=(num_layers, *shape), global_offset=(index, *offset))

    def add_axis(part: ShardedTensor) -> ShardedTensor:
        axes = part.prepend_axis_num + 1
        fragments = part.axis_fragmentations
        return dataclasses.replace(
            part,
            key=key,
            data=part.data.detach()[(None,) * axes],
            local_shape=(1,) * axes + tuple(part.local_shape),
            global_shape=(num_layers, *part.global_shape),
            global_offset=(index, *part.global_offset),
            axis_fragmentations=fragments and (num_layers, *fragments),
            prepend_axis_num=0,
        )

    def build(key, data, replica_id, flattened_range):
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        return dict_list_map_outplace(add_axis, [parts])

    def merge(loaded):
        (parts,) = dict_list_map_outplace(lambda x: x.reshape(x.shape[x.dim() - entry.data.dim() :]), loaded)
        return entry.merge_fn(parts) if isinstance(entry, ShardedTensorFactory) else parts

    return ShardedTensorFactory(key, entry.data, build, merge, entry.replica_id)
