"""Compare this run with the run that saved a checkpoint: refuse checkpoints of other models, and take over their args.

A GPT and a HybridModel with HGRN2 layers are two forms of one model, and each form loads the other's checkpoints.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hgrn2_megatron.arguments import GPT, STACK, full_spec, is_hgrn2_spec, is_stack_spec
from hgrn2_megatron.config import ATTENTION, CHANNEL_MIXERS, EXPERTS, PIPE, HGRN2Config, UsageError, stages_fit
from hgrn2_megatron.forms import Layers, gpt_pattern

# Megatron's flag -> its attribute, for the flags that decide the shapes and the meaning of weights outside the mixers
BLOCK_FLAGS = {
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--disable-bias-linear": "add_bias_linear",
    "--swiglu": "swiglu",
    "--untie-embeddings-and-output-weights": "untie_embeddings_and_output_weights",
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
# Megatron's scripts that build one form of a model only
SCRIPTS = {"pretrain_gpt.py": GPT, "pretrain_hybrid.py": STACK, "pretrain_mamba.py": STACK}

HYBRID_SCRIPT = "pretrain_hybrid.py with --spec hgrn2_stack"


def restore(args: argparse.Namespace, before: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Complete --use-checkpoint-args, after Megatron has copied the args that it knows from a checkpoint.

    This copies the plugin's flags. The form of the model is the one that --spec on the command line names. Without the
    flag it is the form that the script builds, or the checkpoint's if that is not known. If the checkpoint has the
    other form, the layers are translated. If the checkpoint's hybrid layer pattern does not fit this run's pipeline
    stages, its `|` are removed.

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
    # Every run through the launcher saves the plugin's flags, but they mean something only for an HGRN2 model.
    for name in CHECKPOINT_ARGS if saved_is_hgrn2 else ("layernorm_epsilon",):
        if name == "hgrn2_layer_pattern" and stack != saved.stack:
            continue
        if hasattr(checkpoint_args, name):
            setattr(args, name, getattr(checkpoint_args, name))


def _translate_layers(args: argparse.Namespace, before: argparse.Namespace, saved: Layers, saved_is_hgrn2: bool):
    """Set the flags that describe the layers, where Megatron copied those of the other form from a checkpoint."""
    if not saved.stack:
        # Megatron derives the depth of a HybridModel from its pattern.
        args.num_layers, args.moe_layer_freq = None, before.moe_layer_freq
        if not args.hybrid_layer_pattern and saved_is_hgrn2:
            args.hybrid_layer_pattern = saved.symbols
        return
    layers, experts = _gpt_layers(saved)
    args.hybrid_layer_pattern = before.hybrid_layer_pattern
    args.num_layers = before.num_layers or len(layers)
    # If the user gives another depth, it is refused by name later, and Megatron must be able to build the model first.
    if any(experts) and args.num_layers == len(layers):
        args.moe_layer_freq = [*map(int, experts)]
    if saved_is_hgrn2:
        args.hgrn2_layer_pattern = layers


def _gpt_layers(saved: Layers) -> tuple[str, list[bool]]:
    """Return the layers of the GPT that could load a checkpoint: a letter for each, and whether each has experts."""
    try:
        return gpt_pattern(saved.symbols)
    except UsageError as error:
        raise UsageError(f"a GPT cannot load the checkpoint: {error}. Run {HYBRID_SCRIPT} instead") from error


def check_format(args: argparse.Namespace, kind: str):
    """Refuse a checkpoint of a run with Megatron-FSDP in a run without it, and the other way round.

    Args:
        args: Megatron's args of this run.
        kind: name of Megatron's CheckpointType. A run without Megatron-FSDP sees the format fsdp_dtensor as torch_dcp.

    Raises:
        UsageError: Megatron cannot read the checkpoint in this run.
    """
    if getattr(args, "use_megatron_fsdp", False):
        if kind in ("GLOBAL", "LEGACY"):
            raise UsageError(
                "--use-megatron-fsdp cannot load a checkpoint that was saved without it: give "
                "--use-distributed-optimizer in its place, or train without --load"
            )
    elif kind in ("FSDP_DTENSOR", "TORCH_DCP"):
        raise UsageError(
            "the checkpoint to load was saved with --use-megatron-fsdp and has the format fsdp_dtensor: give "
            "--use-megatron-fsdp --ckpt-format fsdp_dtensor, or train without --load"
        )


def check_tensor_parallel_size(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Refuse to change the TP size of a checkpoint of Megatron-FSDP, which keeps the lower bounds by TP rank."""
    if not getattr(args, "use_megatron_fsdp", False):
        return
    before, now = checkpoint_args.tensor_model_parallel_size, args.tensor_model_parallel_size
    if before != now:
        raise UsageError(
            f"--tensor-model-parallel-size is {now}, but the checkpoint was saved with {before}, and Megatron-FSDP "
            f"cannot divide its lower bounds in another way: give --tensor-model-parallel-size {before}"
        )


def _check_expert_parallel_size(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Refuse to load the optimizer's state if only one of the two runs divides its experts among ranks.

    With expert parallelism Megatron saves the states of experts as an optimizer of their own, and without it as a part
    of the only optimizer. It cannot load one in the place of the other.
    """
    if args.finetune or args.no_load_optim or not args.num_experts or getattr(args, "use_megatron_fsdp", False):
        return
    now, before = args.expert_model_parallel_size, checkpoint_args.expert_model_parallel_size
    if (now > 1) != (before > 1):
        raise UsageError(
            f"--expert-model-parallel-size is {now} here and {before} in the checkpoint to load, and Megatron can load "
            f"the state of the optimizer only if both are 1 or both are larger: give --expert-model-parallel-size "
            f"{before}, or give --no-load-optim to load the weights alone"
        )


def check(
    args: argparse.Namespace,
    checkpoint_args: argparse.Namespace,
    distributed: bool,
    optimizer_format: str | None = None,
):
    """Refuse a checkpoint whose weights would mean something else in this run's model.

    Args:
        args: Megatron's args of this run.
        checkpoint_args: args of the run that saved the checkpoint.
        distributed: whether the checkpoint's format is torch_dist.
        optimizer_format: Megatron's name of the format in which the checkpoint has the state of the distributed
            optimizer, or None if it has none.

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
        check_tensor_parallel_size(args, checkpoint_args)
        _check_expert_parallel_size(args, checkpoint_args)
        _check_heads(args, Layers.of(args), Layers.of(checkpoint_args))
        _check_form(args, checkpoint_args, distributed, optimizer_format)
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
    here, saved = HGRN2Config.of(args), HGRN2Config.of(checkpoint_args)
    pairs = _layer_flags(args, Layers.of(args), checkpoint_args, Layers.of(checkpoint_args))
    pairs["--hgrn2-expand-ratio"] = (here.expand_ratio, saved.expand_ratio)
    pairs["--hgrn2-lower-bounds"] = (here.lower_bounds, saved.lower_bounds)
    refuse_differences(
        pairs, "give the checkpoint's value, or drop the flag and add --use-checkpoint-args, or train without --load"
    )


def other_vocabulary(args: argparse.Namespace, checkpoint_args: argparse.Namespace) -> str | None:
    """Return a warning if the checkpoint has more or fewer rows of padding in its vocabulary, or None."""
    here, saved = (getattr(one, "padded_vocab_size", None) for one in (args, checkpoint_args))
    if here is None or saved is None or here == saved:
        return None
    tp, tokens = args.tensor_model_parallel_size, getattr(args, "vocab_size", None) or 0
    keep = f": to keep them, give --use-checkpoint-args, or --make-vocab-size-divisible-by {saved // tp}"
    return (
        f"the vocabulary has {here} rows with its padding here and {saved} in the checkpoint. Megatron cuts off or "
        "adds rows, which changes the loss unless the model has learned to ignore them"
        + (keep if saved % tp == 0 and tokens <= saved else "")
    )


def _layer_flags(args, here: Layers, checkpoint_args, saved: Layers) -> dict[str, tuple]:
    """Return the flags that describe the layers in this run's form: flag -> (value here, value for the checkpoint)."""
    num_experts = tuple(
        run.num_experts if EXPERTS in layers.symbols else None
        for run, layers in ((args, here), (checkpoint_args, saved))
    )
    if here.stack:
        return {"--hybrid-layer-pattern": (here.symbols, saved.symbols), "--num-experts": num_experts}
    (ours, our_experts), (theirs, their_experts) = gpt_pattern(here.symbols), _gpt_layers(saved)
    return {
        "--num-layers": (len(ours), len(theirs)),
        "--hgrn2-layer-pattern": (ours, theirs),
        "--num-experts": num_experts,
        "--moe-layer-freq": ([*map(int, our_experts)], [*map(int, their_experts)]),
    }


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


def _check_heads(args, here: Layers, saved: Layers):
    """Refuse a checkpoint with other heads for multi-token prediction, unless --finetune starts or drops them."""
    if here.same_heads(saved) or args.finetune:
        return
    whole = f"{saved.symbols}{saved.heads}"
    if not here.stack:
        raise UsageError(
            f"the checkpoint to load has --hybrid-layer-pattern {whole}, and a GPT with HGRN2 layers has no heads for "
            f"multi-token prediction: give --finetune to load it without its heads, or run {HYBRID_SCRIPT}"
        )
    refuse_differences(
        {
            "--hybrid-layer-pattern": (f"{here.symbols}{here.heads}", whole),
            "--mtp-use-repeated-layer": (here.repeated_head, saved.repeated_head),
        },
        "give the checkpoint's heads, or give --finetune to start other heads fresh and to leave out those that this "
        "run does not have",
    )


def _check_form(args, checkpoint_args, distributed: bool, optimizer_format: str | None):
    """Refuse a checkpoint of the other form, if its format depends on the form."""
    stack = is_stack_spec(args.spec)
    if is_stack_spec(checkpoint_args.spec) == stack:
        return
    models = ("a GPT", "a HybridModel") if stack else ("a HybridModel", "a GPT")
    of_other_form = "the checkpoint to load is of {}, and this run builds {}".format(*models)
    if not distributed:
        raise UsageError(f"{of_other_form}: save the checkpoint with --ckpt-format torch_dist, which both load")
    no_state = args.finetune or args.no_load_optim or getattr(checkpoint_args, "no_save_optim", False)
    movable = (None, *DistributedOptimizer.checkpoint_fully_reshardable_formats)
    if not no_state and optimizer_format not in movable:
        raise UsageError(
            f"{of_other_form}, which cannot load the state of the distributed optimizer in the format "
            f"{optimizer_format}: save the checkpoint with --dist-ckpt-optim-fully-reshardable, or give --no-load-optim"
        )


def _check_attention(args, checkpoint_args, distributed: bool):
    """Refuse a checkpoint of an attention model, unless this run can take weights from it."""
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
    here, saved = Layers.of(args), Layers.of(checkpoint_args)
    has_attention = ATTENTION in here.symbols
    flags = BLOCK_FLAGS | (ATTENTION_FLAGS if has_attention else {})
    both = (args, checkpoint_args)
    # HGRN2 layers start fresh, so they may stand in the place of any token mixer.
    symbols = [
        ours if ours == "M" and theirs not in CHANNEL_MIXERS else theirs
        for ours, theirs in zip(here.symbols, saved.symbols, strict=False)
    ]
    symbols += saved.symbols[len(symbols) :]
    if here.stack and here.symbols != "".join(symbols):
        raise UsageError(
            f"--hybrid-layer-pattern is {here.symbols} here, and the layers of the checkpoint to load are "
            f"{saved.symbols}: write the checkpoint's layers, with M in the place of some of its token mixers"
        )
    pairs = _layer_flags(args, here, checkpoint_args, dataclasses.replace(saved, symbols="".join(symbols)))
    # A flag that the other run's Megatron release does not know counts as off.
    pairs |= {flag: tuple(getattr(run, name, None) or None for run in both) for flag, name in flags.items()}
    if has_attention:
        pairs["--num-query-groups"] = tuple(map(_num_query_groups, both))
    if has_attention or checkpoint_args.position_embedding_type == "learned_absolute":
        pairs["--position-embedding-type"] = tuple(run.position_embedding_type for run in both)
    refuse_differences(
        pairs, "weights can be taken from an attention model only if the flag has the same value, so change it"
    )


def _num_query_groups(args) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads
