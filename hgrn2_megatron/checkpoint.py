"""Refuse checkpoints of other models, and load the weights that this model shares with an attention model.

Megatron loads a distributed checkpoint by a dict of the entries that it wants. This module removes from the dict each
entry that does not exist in the checkpoint, or that means something else there. The weights of a removed entry keep
their initial values.
"""

import argparse
import copy
import dataclasses
import re
import sys

import torch
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from hgrn2_megatron.arguments import GPT, STACK, full_spec, is_hgrn2_spec, is_stack_spec, spec_of
from hgrn2_megatron.config import ATTENTION, HGRN2, PIPE, HGRN2Config, UsageError, stages_fit

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

# Megatron's flag -> its attribute, for the flags that decide the shapes and the meaning of weights outside the mixers
BLOCK_FLAGS = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--disable-bias-linear": "add_bias_linear",
    "--swiglu": "swiglu",
    "--untie-embeddings-and-output-weights": "untie_embeddings_and_output_weights",
    "--num-experts": "num_experts",
    "--hybrid-layer-pattern": "hybrid_layer_pattern",
    "--multi-latent-attention": "multi_latent_attention",
    "--experimental-attention-variant": "experimental_attention_variant",
}
# Flag -> attribute, for the flags that decide the shapes and the meaning of the weights of attention layers.
ATTENTION_FLAGS = {
    "--num-attention-heads": "num_attention_heads",
    "--kv-channels": "kv_channels",
    "--add-qkv-bias": "add_qkv_bias",
    "--qk-layernorm": "qk_layernorm",
    "--rotary-base": "rotary_base",
    "--rotary-percent": "rotary_percent",
}

# args that --use-checkpoint-args restores in addition to those that Megatron itself restores
CHECKPOINT_ARGS = tuple(f"hgrn2_{f.name}" for f in dataclasses.fields(HGRN2Config)) + ("layernorm_epsilon",)


def restore(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Copy the plugin's flags from a checkpoint's args into `args`, as --use-checkpoint-args does for Megatron's flags.

    Before this call Megatron has copied the checkpoint's spec into `args`. It has also copied the checkpoint's hybrid
    layer pattern if the command line has none. If that pattern does not fit this run's pipeline stages, its `|` are
    removed.

    Args:
        args: Megatron's args of this run; changed in place.
        checkpoint_args: args of the run that saved the checkpoint.

    Raises:
        UsageError: the checkpoint has another spec than this run.
    """
    if not is_hgrn2_spec(args.spec):
        raise UsageError(
            f"--use-checkpoint-args would take --spec {' '.join(args.spec)} from the checkpoint: drop the flag"
        )
    asked = spec_of(sys.argv[1:])
    if asked is not None:
        _refuse_other_form(asked, args.spec)
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern and not stages_fit(pattern, args.pipeline_model_parallel_size):
        args.hybrid_layer_pattern = pattern.replace(PIPE, "")
    # Every run through the launcher saves the plugin's flags, but they mean something only for an HGRN2 model.
    saved_is_hgrn2 = is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    for name in CHECKPOINT_ARGS if saved_is_hgrn2 else ("layernorm_epsilon",):
        if hasattr(checkpoint_args, name):
            setattr(args, name, getattr(checkpoint_args, name))


def _refuse_other_form(spec_here: list[str], saved_spec: list[str]):
    """Refuse a GPT's checkpoint for a HybridModel, and a HybridModel's checkpoint for a GPT.

    Args:
        spec_here: this run's spec, which names an HGRN2 model.
        saved_spec: the checkpoint's spec, which names an HGRN2 model too.

    Raises:
        UsageError: one is a GPT and the other a HybridModel. The message names the script that loads the checkpoint.
    """
    stack = is_stack_spec(saved_spec)
    if is_stack_spec(spec_here) == stack:
        return
    script, spec, model = ("pretrain_hybrid.py", STACK, "HybridModel") if stack else ("pretrain_gpt.py", GPT, "GPT")
    here, there = (" ".join(full_spec(list(words)) or ()) for words in (spec_here, saved_spec))
    raise UsageError(
        f"--spec is {here} here and {there} in the checkpoint to load: the weights of a {model} have other names, so "
        f"run {script} with --spec {spec} and --use-checkpoint-args, or train without --load"
    )


def check(args: argparse.Namespace, checkpoint_args: argparse.Namespace, distributed: bool):
    """Refuse a checkpoint whose weights would mean something else in this run's model.

    Args:
        args: Megatron's args of this run.
        checkpoint_args: args of the run that saved the checkpoint.
        distributed: whether the checkpoint's format is torch_dist.

    Raises:
        UsageError: the checkpoint does not fit. The message names the flag that differs, or the flag to add.
    """
    is_hgrn2, saved_is_hgrn2 = is_hgrn2_spec(args.spec), is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    if saved_is_hgrn2 and not is_hgrn2:
        raise UsageError(
            "the checkpoint to load is of an HGRN2 model, but --spec is not: give --spec hgrn2 (or hgrn2_stack), or "
            "train without --load"
        )
    if not is_hgrn2:
        return
    if saved_is_hgrn2:
        check_same_model(args, checkpoint_args)
    else:
        _check_attention(args, checkpoint_args, distributed)
    saved = getattr(checkpoint_args, "transformer_impl", args.transformer_impl)
    if not distributed and saved != args.transformer_impl:
        raise UsageError(
            f"--transformer-impl is {args.transformer_impl} here and {saved} in the checkpoint to load: "
            f"give --transformer-impl {saved}, or save the checkpoint with --ckpt-format torch_dist, which both load"
        )


def check_same_model(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Refuse a checkpoint of another HGRN2 model, before its weights are loaded.

    Megatron would silently load a checkpoint with another number of heads, because its projections have the same
    shapes. If the depth or the pattern differs, Megatron's own error is a list of missing weights.

    Args:
        args: Megatron's args of this run.
        checkpoint_args: args of the run that saved the checkpoint.

    Raises:
        UsageError: the two models differ. The message names the first flag that differs.
    """
    _refuse_other_form(args.spec, checkpoint_args.spec)
    here, saved = HGRN2Config.of(args), HGRN2Config.of(checkpoint_args)
    pairs: dict[str, tuple] = {}
    if is_stack_spec(args.spec):
        pairs["--hybrid-layer-pattern"] = (_without_stages(args), _without_stages(checkpoint_args))
    else:
        depth = args.num_layers
        pairs["--num-layers"] = (depth, checkpoint_args.num_layers)
        pairs["--hgrn2-layer-pattern"] = (_whole_pattern(here, depth), _whole_pattern(saved, depth))
    pairs["--hgrn2-expand-ratio"] = (here.expand_ratio, saved.expand_ratio)
    pairs["--hgrn2-lower-bounds"] = (here.lower_bounds, saved.lower_bounds)
    refuse_differences(
        pairs, "give the checkpoint's value, or drop the flag and add --use-checkpoint-args, or train without --load"
    )


def _whole_pattern(config: HGRN2Config, depth: int) -> str:
    """Return the layer pattern with one letter for each of `depth` layers."""
    return "".join(HGRN2 if config.is_hgrn2_layer(layer) else ATTENTION for layer in range(depth))


def _without_stages(args: argparse.Namespace) -> str:
    """Return a HybridModel's layer pattern without `|`, because the pipeline stages are not part of the model."""
    return (getattr(args, "hybrid_layer_pattern", None) or "").replace(PIPE, "")


def refuse_differences(pairs: dict, instead: str):
    """Refuse the first difference between this run and a checkpoint.

    Args:
        pairs: flag -> (value in this run, value in the checkpoint).
        instead: end of the message, which tells the user what to do instead.

    Raises:
        UsageError: a value differs. The message names its flag.
    """
    for flag, (given, saved) in pairs.items():
        if given != saved:
            raise UsageError(f"{flag} is {given} here and {saved} in the checkpoint to load: {instead}")


def _check_attention(args, checkpoint_args, distributed: bool):
    """Refuse a checkpoint of an attention model, unless this run can take weights from it."""
    if is_stack_spec(args.spec):
        raise UsageError(
            "the checkpoint to load is not of an HGRN2 model, and a HybridModel takes no weights from other models: "
            "run pretrain_gpt.py with --spec hgrn2 and --finetune, or train without --load"
        )
    if not args.finetune:
        raise UsageError(
            "the checkpoint to load is not of an HGRN2 model: give --finetune to load the weights that both models "
            "share and start the others and the optimizer fresh, or train without --load"
        )
    if not distributed:
        raise UsageError(
            "--finetune takes weights from an attention model only if its checkpoint is of --ckpt-format torch_dist: "
            "save it in this format"
        )
    has_attention = ATTENTION in HGRN2Config.of(args).layer_pattern
    flags = BLOCK_FLAGS | (ATTENTION_FLAGS if has_attention else {})
    both = (args, checkpoint_args)
    # A flag that the other run's Megatron release does not know counts as off.
    pairs = {flag: tuple(getattr(run, name, None) or None for run in both) for flag, name in flags.items()}
    if has_attention:
        pairs["--num-query-groups"] = tuple(map(_num_query_groups, both))
    if has_attention or checkpoint_args.position_embedding_type == "learned_absolute":
        pairs["--position-embedding-type"] = tuple(run.position_embedding_type for run in both)
    refuse_differences(
        pairs, "weights can be taken from an attention model only if the flag has the same value, so change it"
    )


def _num_query_groups(args) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


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
    saved_impl = getattr(checkpoint_args, "transformer_impl", args.transformer_impl)
    if not from_attention and saved_impl == args.transformer_impl:
        return args
    stored = load_sharded_metadata(checkpoint)
    if from_attention:
        args = _from_attention(args, wanted, stored)
    _keep_extra_states(wanted, stored)
    return args


def _keep(entry: ShardedBase) -> LocalNonpersistentObject:
    """Return a replacement for an entry of the dict of wanted entries. Megatron keeps its value and loads nothing."""
    return LocalNonpersistentObject(entry.data)


def _keep_extra_states(wanted: dict, stored: dict):
    """Keep the FP8 states of Transformer Engine that a checkpoint of Megatron's own modules does not have."""

    def adapt_entry(entry):
        if isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state") and entry.unique_key not in stored:
            return _keep(entry)
        return entry

    dict_list_map_inplace(adapt_entry, wanted)


def _from_attention(args, wanted: dict, stored: dict) -> argparse.Namespace:
    """Remove from `wanted` the entries that an attention checkpoint does not have, and print what will be loaded.

    Returns:
        A copy of `args` with which Megatron can load the other entries.
    """
    hgrn2 = HGRN2Config.of(args)
    fresh = [layer for layer in range(args.num_layers) if hgrn2.is_hgrn2_layer(layer)]
    fresh_keys = (*(f"decoder.layers.{layer}.self_attention." for layer in fresh), "decoder.hgrn2_bounds.")
    stacked = not any(LAYER.match(key) for key in stored)

    def adapt_entry(entry):
        if not isinstance(entry, ShardedBase):
            return entry
        if entry.key.startswith(fresh_keys):
            return _keep(entry)
        layer = LAYER.match(entry.key)
        return _layer_of_stack(entry, layer, args.num_layers) if layer and stacked else entry

    for name, chunk in wanted.items():
        if re.fullmatch(r"model\d*", name):
            dict_list_map_inplace(adapt_entry, chunk)
    if torch.distributed.get_rank() == 0:
        print(
            f"HGRN2: loading {args.num_layers - len(fresh)} of {args.num_layers} mixers and all other shared weights "
            "from an attention checkpoint; starting fresh: the mixers of layers "
            f"{', '.join(str(n + 1) for n in fresh)} with their input norms, the lower bounds, the optimizer",
            flush=True,
        )
    # Megatron checks that the ranks together read every part of an entry. No rank reads the attention of HGRN2 layers.
    args = copy.copy(args)
    args.ckpt_load_validate_sharding_integrity = False
    return args


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
