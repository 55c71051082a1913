"""Complete --use-checkpoint-args: take over the args of a checkpoint, whose model may have the other form.

A GPT and a HybridModel with HGRN2 layers are two forms of one model, and each form loads the other's checkpoints.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from hgrn2_megatron.arguments import GPT, STACK, full_spec, is_hgrn2_spec, is_stack_spec
from hgrn2_megatron.checkpoint_flags import LATENT_FLAGS
from hgrn2_megatron.config import LATENT_ATTENTION, PIPE, HGRN2Config, UsageError, stages_fit
from hgrn2_megatron.forms import Layers, gpt_pattern

# args that --use-checkpoint-args restores in addition to those that Megatron itself restores
CHECKPOINT_ARGS = tuple(f"hgrn2_{f.name}" for f in dataclasses.fields(HGRN2Config)) + ("layernorm_epsilon",)
# the same for a checkpoint with multi-latent attention
LATENT_ARGS = ("qk_layernorm", *LATENT_FLAGS.values())
# Megatron's scripts that build one form of a model only
SCRIPTS = {"pretrain_gpt.py": GPT, "pretrain_hybrid.py": STACK, "pretrain_mamba.py": STACK}

HYBRID_SCRIPT = "pretrain_hybrid.py with --spec hgrn2_stack"


def restore(args: argparse.Namespace, before: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Complete --use-checkpoint-args, after Megatron has copied the args that it knows from a checkpoint.

    This copies the plugin's flags. The form of the model is the one that --spec on the command line names. Without the
    flag it is the form that the script builds, or the checkpoint's if that is not known. If the checkpoint has the
    other form, the layers are translated. If the checkpoint's hybrid layer pattern does not fit this run's pipeline
    stages, its `|` are removed. From an attention model this does not take the dropout.

    Args:
        args: Megatron's args of this run, with what Megatron copied; changed in place.
        before: copy of the args before Megatron copied anything.
        checkpoint_args: args of the run that saved the checkpoint.

    Raises:
        UsageError: no GPT has the layers of the checkpoint, and this run builds a GPT.
    """
    script = SCRIPTS.get(Path(sys.argv[0]).name)
    args.spec = full_spec(before.spec or (script and [script]) or args.spec)
    saved_is_hgrn2 = is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    stack, saved = is_stack_spec(args.spec), Layers.of(checkpoint_args)
    if stack != saved.stack:
        _translate_layers(args, before, saved, saved_is_hgrn2)
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern == getattr(before, "hybrid_layer_pattern", None):
        # Megatron copies the number of heads, but the pattern with the heads is not the checkpoint's.
        args.mtp_num_layers = before.mtp_num_layers
    if pattern and not stages_fit(pattern, args.pipeline_model_parallel_size):
        args.hybrid_layer_pattern = pattern.replace(PIPE, "")
    if not saved_is_hgrn2:
        # An HGRN2 model starts from an attention model, which may have been trained with dropout.
        args.hidden_dropout, args.attention_dropout = before.hidden_dropout, before.attention_dropout
    # Every run through the launcher saves the plugin's flags, but they mean something only for an HGRN2 model.
    names = CHECKPOINT_ARGS if saved_is_hgrn2 else ("layernorm_epsilon",)
    for name in names + (LATENT_ARGS if LATENT_ATTENTION in saved.symbols + saved.heads else ()):
        if name == "hgrn2_layer_pattern" and stack != saved.stack:
            continue
        if hasattr(checkpoint_args, name):
            setattr(args, name, getattr(checkpoint_args, name))


def _translate_layers(args: argparse.Namespace, before: argparse.Namespace, saved: Layers, saved_is_hgrn2: bool):
    """Set the flags that describe the layers, where Megatron copied those of the other form from a checkpoint."""
    if not saved.stack:
        # Megatron derives the depth of a HybridModel from its pattern.
        args.num_layers, args.moe_layer_freq = None, before.moe_layer_freq
        # --use-mp-args-from-checkpoint-args copies it. In a HybridModel the pattern's `|` make virtual stages.
        args.num_layers_per_virtual_pipeline_stage = before.num_layers_per_virtual_pipeline_stage
        if not args.hybrid_layer_pattern and saved_is_hgrn2:
            args.hybrid_layer_pattern = saved.symbols
        return
    layers, experts = gpt_layers(saved)
    args.hybrid_layer_pattern = before.hybrid_layer_pattern
    args.num_layers = before.num_layers or len(layers)
    # If the user gives another depth, it is refused by name later, and Megatron must be able to build the model first.
    if any(experts) and args.num_layers == len(layers):
        args.moe_layer_freq = [*map(int, experts)]
    if saved_is_hgrn2:
        args.hgrn2_layer_pattern = layers


def gpt_layers(saved: Layers) -> tuple[str, list[bool]]:
    """Return the layers of the GPT that could load a checkpoint: a letter for each, and whether each has experts."""
    try:
        return gpt_pattern(saved.symbols)
    except UsageError as error:
        raise UsageError(f"a GPT cannot load the checkpoint: {error}. Run {HYBRID_SCRIPT} instead") from error
