"""Compare this run with the run that saved a checkpoint, and refuse checkpoints that do not fit.

A GPT and a HybridModel with HGRN2 layers are two forms of one model, and each form loads the other's checkpoints.
"""

import argparse
import dataclasses

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hgrn2_megatron.arguments import is_hgrn2_spec, is_stack_spec
from hgrn2_megatron.checkpoint_flags import ATTENTION_FLAGS, BLOCK_FLAGS, LATENT_FLAGS, POSITION_FLAGS, SIZE_FLAGS
from hgrn2_megatron.config import (
    ATTENTION,
    CHANNEL_MIXERS,
    EXPERTS,
    LATENT_ATTENTION,
    HGRN2Config,
    UsageError,
    query_groups,
)
from hgrn2_megatron.forms import Layers, gpt_pattern
from hgrn2_megatron.restored_args import HYBRID_SCRIPT, gpt_layers


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
    release: bool = False,
):
    """Refuse a checkpoint whose weights would mean something else in this run's model.

    Args:
        args: Megatron's args of this run.
        checkpoint_args: args of the run that saved the checkpoint.
        distributed: whether the checkpoint's format is torch_dist.
        optimizer_format: Megatron's name of the format in which the checkpoint has the state of the distributed
            optimizer, or None if it has none.
        release: whether the checkpoint has weights only, as a converted one has.

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
        _check_heads(args, Layers.of(args), Layers.of(checkpoint_args))
        _check_form(args, checkpoint_args, distributed, optimizer_format)
        if not release:
            _check_expert_parallel_size(args, checkpoint_args)
            _check_optimizer(args, checkpoint_args, optimizer_format)
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
    layers, saved_layers = Layers.of(args), Layers.of(checkpoint_args)
    pairs = _layer_flags(args, layers, checkpoint_args, saved_layers)
    pairs["--hgrn2-expand-ratio"] = (here.expand_ratio, saved.expand_ratio)
    pairs["--hgrn2-lower-bounds"] = (here.lower_bounds, saved.lower_bounds)
    pairs["--hgrn2-norm-eps"] = (here.norm_eps, saved.norm_eps)
    # other heads for multi-token prediction start fresh
    heads = layers.heads if layers.same_heads(saved_layers) else ""
    pairs |= _block_flags(args, checkpoint_args, layers.symbols + heads)
    given = getattr(args, "use_checkpoint_args", False)
    drop = "drop the flag" if given else "drop the flag and add --use-checkpoint-args"
    advice = f"give the checkpoint's value, or {drop}, or train without --load"
    positions = {flag: pairs.pop(flag) for flag in POSITION_FLAGS if flag in pairs}
    refuse_differences(pairs, advice)
    # a model may get other positions on purpose, for example for longer sequences
    if not (args.finetune or args.no_load_optim):
        refuse_differences(positions, f"{advice}. To change it on purpose, give --finetune or --no-load-optim")


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
    (ours, our_experts), (theirs, their_experts) = gpt_pattern(here.symbols), gpt_layers(saved)
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
    if _loads_optimizer(args, checkpoint_args) and not _moves_anywhere(optimizer_format):
        raise UsageError(
            f"{of_other_form}, which cannot load the state of the distributed optimizer in the format "
            f"{optimizer_format}: save the checkpoint with --dist-ckpt-optim-fully-reshardable, or give --no-load-optim"
        )


def _loads_optimizer(args, checkpoint_args) -> bool:
    return not (args.finetune or args.no_load_optim or getattr(checkpoint_args, "no_save_optim", False))


def _moves_anywhere(optimizer_format: str | None) -> bool:
    """Return whether a run with any form and layout can load the state of a distributed optimizer, or there is none."""
    return optimizer_format in (None, *DistributedOptimizer.checkpoint_fully_reshardable_formats)


def _check_optimizer(args, checkpoint_args, optimizer_format: str | None):
    """Refuse the state of an optimizer that Megatron cannot load in this run."""
    if not _loads_optimizer(args, checkpoint_args):
        return
    if any(getattr(run, "use_megatron_fsdp", False) for run in (args, checkpoint_args)):
        return
    here, saved = (bool(getattr(run, "use_distributed_optimizer", False)) for run in (args, checkpoint_args))
    refuse_differences(
        {"--use-distributed-optimizer": (here, saved)},
        "Megatron cannot load the state of one optimizer in the other: give the checkpoint's value, or --no-load-optim",
    )
    if not here or _moves_anywhere(optimizer_format):
        return
    flags = SIZE_FLAGS | ({"--hybrid-layer-pattern": "hybrid_layer_pattern"} if is_stack_spec(args.spec) else {})
    refuse_differences(
        {flag: tuple(getattr(run, name, None) or 1 for run in (args, checkpoint_args)) for flag, name in flags.items()},
        f"the state of the distributed optimizer is in the format {optimizer_format}, which moves to other "
        "data-parallel ranks only: save it with --dist-ckpt-optim-fully-reshardable, or give --no-load-optim",
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
    pairs |= _block_flags(args, checkpoint_args, here.symbols)
    if checkpoint_args.position_embedding_type == "learned_absolute":
        pairs["--position-embedding-type"] = (args.position_embedding_type, "learned_absolute")
    refuse_differences(
        pairs, "weights can be taken from an attention model only if the flag has the same value, so change it"
    )


def _block_flags(args, checkpoint_args, symbols: str) -> dict[str, tuple]:
    """Return the flags of all but the layers' order: flag -> (value here, value in the checkpoint).

    `symbols` are those of the layers whose weights are loaded, as in a HybridModel's pattern.
    """
    runs = (args, checkpoint_args)
    flags = dict(BLOCK_FLAGS)
    if {ATTENTION, LATENT_ATTENTION} & set(symbols):
        flags |= ATTENTION_FLAGS
    if LATENT_ATTENTION in symbols:
        flags |= LATENT_FLAGS
    # A flag that the other run's Megatron release does not know counts as off.
    pairs = {flag: tuple(getattr(run, name, None) or False for run in runs) for flag, name in flags.items()}
    if ATTENTION in symbols:
        pairs["--num-query-groups"] = tuple(map(query_groups, runs))
        pairs["--position-embedding-type"] = tuple(getattr(run, "position_embedding_type", None) for run in runs)
    return pairs
