"""Checkpoints of other runs: what of plain attention's, or of the other transformer implementation's, can be loaded.

Megatron reads a distributed checkpoint by a dict of the entries that it wants. What a run here does not have in
common with the run that saved is taken out of that dict and keeps the value it has, so that nothing is loaded wrong.
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

# Megatron's flag -> its attribute, of what decides the shapes and the meaning of the weights outside the mixers
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
# and of the attention layers
ATTENTION_FLAGS = {
    "--num-attention-heads": "num_attention_heads",
    "--kv-channels": "kv_channels",
    "--add-qkv-bias": "add_qkv_bias",
    "--qk-layernorm": "qk_layernorm",
    "--rotary-base": "rotary_base",
    "--rotary-percent": "rotary_percent",
}

# what a checkpoint says of its model, beside what Megatron itself restores
CHECKPOINT_ARGS = tuple(f"hgrn2_{f.name}" for f in dataclasses.fields(HGRN2Config)) + ("layernorm_epsilon",)


def restore(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Take the model's own flags from a checkpoint's args, as --use-checkpoint-args does for Megatron's.

    Megatron has put the checkpoint's spec and, where the command line has none, its layer pattern into args by now. The
    stages in that pattern are those of the run that saved.

    Raises:
        UsageError: the checkpoint's spec is another than this run's.
    """
    if not is_hgrn2_spec(args.spec):
        raise UsageError(f"--use-checkpoint-args: the checkpoint is of --spec {' '.join(args.spec)}; drop the flag")
    asked = spec_of(sys.argv[1:])
    if asked is not None:
        _refuse_other_form(asked, args.spec)
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern and not stages_fit(pattern, args.pipeline_model_parallel_size):
        args.hybrid_layer_pattern = pattern.replace(PIPE, "")
    # every run through the launcher saves the plugin's flags; they mean something where the model is HGRN2
    saved_is_hgrn2 = is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    for name in CHECKPOINT_ARGS if saved_is_hgrn2 else ("layernorm_epsilon",):
        if hasattr(checkpoint_args, name):
            setattr(args, name, getattr(checkpoint_args, name))


def _refuse_other_form(spec_here: list[str], saved_spec: list[str]):
    """Refuse a checkpoint of a GPT for a HybridModel, and the other way round.

    Args:
        spec_here: this run's spec, which names an HGRN2 model.
        saved_spec: the checkpoint's spec, which names an HGRN2 model too.

    Raises:
        UsageError: it says which script takes the checkpoint.
    """
    stack = is_stack_spec(saved_spec)
    if is_stack_spec(spec_here) == stack:
        return
    script, spec, model = ("pretrain_hybrid.py", STACK, "HybridModel") if stack else ("pretrain_gpt.py", GPT, "GPT")
    here, there = (" ".join(full_spec(list(words)) or ()) for words in (spec_here, saved_spec))
    raise UsageError(
        f"--spec is {here} here and {there} in the checkpoint to load: weights of a {model} have other names, so "
        f"run {script} with --spec {spec} and --use-checkpoint-args, or train without --load"
    )


def check(args: argparse.Namespace, checkpoint_args: argparse.Namespace, distributed: bool):
    """Refuse a checkpoint whose weights would mean something else here.

    Args:
        args: of this run.
        checkpoint_args: of the run that saved.
        distributed: whether the checkpoint's format is torch_dist.

    Raises:
        UsageError: it names the flag that differs, or the one to add.
    """
    is_hgrn2, saved_is_hgrn2 = is_hgrn2_spec(args.spec), is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    if saved_is_hgrn2 and not is_hgrn2:
        raise UsageError(
            "the checkpoint to load is of an HGRN2 model: give --spec hgrn2 (or hgrn2_stack), or train without --load"
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
            "only checkpoints of --ckpt-format torch_dist go from one to the other"
        )


def check_same_model(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Compare two HGRN2 models: what decides the meaning and the names of the weights, before they are loaded.

    Megatron would read a checkpoint of other heads without a word, as their projections have the same shapes, and
    end in a list of weights that are missing where the depth or the pattern differs.

    Raises:
        UsageError: the checkpoint is of another model; it names the flag.
    """
    _refuse_other_form(args.spec, checkpoint_args.spec)
    here, saved = HGRN2Config.of(args), HGRN2Config.of(checkpoint_args)
    pairs: dict[str, tuple] = {}
    if is_stack_spec(args.spec):
        pairs["--hybrid-layer-pattern"] = (_symbols(args), _symbols(checkpoint_args))
    else:
        depth = args.num_layers
        pairs["--num-layers"] = (depth, checkpoint_args.num_layers)
        pairs["--hgrn2-layer-pattern"] = (_letters(here, depth), _letters(saved, depth))
    pairs["--hgrn2-expand-ratio"] = (here.expand_ratio, saved.expand_ratio)
    pairs["--hgrn2-lower-bounds"] = (here.lower_bounds, saved.lower_bounds)
    refuse_differences(
        pairs, "give what the checkpoint has, drop the flag and add --use-checkpoint-args, or train without --load"
    )


def _letters(config: HGRN2Config, depth: int) -> str:
    return "".join(HGRN2 if config.is_hgrn2_layer(layer) else ATTENTION for layer in range(depth))


def _symbols(args: argparse.Namespace) -> str:
    """A HybridModel's layers; where stages divide them is no part of the model."""
    return (getattr(args, "hybrid_layer_pattern", None) or "").replace(PIPE, "")


def refuse_differences(pairs: dict, instead: str):
    """Refuse the first difference between this run and a checkpoint.

    Args:
        pairs: flag -> its value (here, in the checkpoint).
        instead: what to do.

    Raises:
        UsageError: it names the flag.
    """
    for flag, (given, saved) in pairs.items():
        if given != saved:
            raise UsageError(f"{flag} is {given} here and {saved} in the checkpoint to load: {instead}")


def _check_attention(args, checkpoint_args, distributed: bool):
    if is_stack_spec(args.spec):
        raise UsageError(
            "the checkpoint to load is not of an HGRN2 model: a HybridModel takes nothing from such; use --spec hgrn2 "
            "with --finetune in pretrain_gpt.py, or train without --load"
        )
    if not args.finetune:
        raise UsageError(
            "the checkpoint to load is not of an HGRN2 model: give --finetune to take over what is equal and start "
            "the rest and the optimizer fresh, or train without --load"
        )
    if not distributed:
        raise UsageError("--finetune from an attention model needs a checkpoint of --ckpt-format torch_dist")
    has_attention = ATTENTION in HGRN2Config.of(args).layer_pattern
    flags = BLOCK_FLAGS | (ATTENTION_FLAGS if has_attention else {})
    both = (args, checkpoint_args)
    # a flag that another release does not know is off
    pairs = {flag: tuple(getattr(run, name, None) or None for run in both) for flag, name in flags.items()}
    if has_attention:
        pairs["--num-query-groups"] = tuple(map(_num_query_groups, both))
    if has_attention or checkpoint_args.position_embedding_type == "learned_absolute":
        pairs["--position-embedding-type"] = tuple(run.position_embedding_type for run in both)
    refuse_differences(pairs, "an attention model gives its weights only to the same block; change one of the two")


def _num_query_groups(args) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def adapt(
    args: argparse.Namespace, wanted: dict, checkpoint_args: argparse.Namespace, checkpoint: str
) -> argparse.Namespace:
    """Fit what Megatron wants of a distributed checkpoint to what there is, in place.

    Args:
        args: of this run, checked with those of the checkpoint.
        wanted: sharded state dict, of the model and whatever else is to be loaded.
        checkpoint_args: of the run that saved.
        checkpoint: its folder.

    Returns:
        args to load with.
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
    """An entry that is not read: the module keeps its own value."""
    return LocalNonpersistentObject(entry.data)


def _keep_extra_states(wanted: dict, stored: dict):
    """Transformer Engine has FP8 state where Megatron's own modules, and their checkpoints, have none."""

    def adapt(entry):
        if isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state") and entry.unique_key not in stored:
            return _keep(entry)
        return entry

    dict_list_map_inplace(adapt, wanted)


def _from_attention(args, wanted: dict, stored: dict) -> argparse.Namespace:
    """Want of an attention checkpoint what an HGRN2 model has in common with it; say what that is."""
    hgrn2 = HGRN2Config.of(args)
    fresh = [layer for layer in range(args.num_layers) if hgrn2.is_hgrn2_layer(layer)]
    fresh_keys = (*(f"decoder.layers.{layer}.self_attention." for layer in fresh), "decoder.hgrn2_bounds.")
    stacked = not any(LAYER.match(key) for key in stored)

    def adapt(entry):
        if not isinstance(entry, ShardedBase):
            return entry
        if entry.key.startswith(fresh_keys):
            return _keep(entry)
        layer = LAYER.match(entry.key)
        return _layer_of_stack(entry, layer, args.num_layers) if layer and stacked else entry

    for name, chunk in wanted.items():
        if re.fullmatch(r"model\d*", name):
            dict_list_map_inplace(adapt, chunk)
    if torch.distributed.get_rank() == 0:
        print(
            f"HGRN2: {args.num_layers - len(fresh)} of {args.num_layers} mixers and all else that is equal from an "
            f"attention checkpoint; starting fresh: the mixers of layers {', '.join(str(n + 1) for n in fresh)} with "
            "their input norms, the lower bounds, the optimizer",
            flush=True,
        )
    # Megatron wants every part of what it reads wanted by somebody, and nobody wants the attention of an HGRN2 layer
    args = copy.copy(args)
    args.ckpt_load_validate_sharding_integrity = False
    return args


def _layer_of_stack(entry: ShardedBase, layer: re.Match, num_layers: int) -> ShardedBase:
    """The same entry where a stack of equal layers was saved as one entry with a first axis of layers.

    Megatron's own way to say so is for a run that reads all of the stack. So the axis is an ordinary one here, of
    length 1 in what is read.
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
