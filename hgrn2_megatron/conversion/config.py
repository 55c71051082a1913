"""Conversion between the config.json of fla's HGRN2 models and the args of a Megatron checkpoint.

Source: fla-org/flash-linear-attention 0.6.0, fla/models/hgrn2/configuration_hgrn2.py and
fla/models/configuration_utils.py.
"""

import argparse
import dataclasses
from typing import Any

from hgrn2_megatron.arguments import GPT, MODULE, STACK, full_spec, glu_width, is_hgrn2_spec, is_stack_spec
from hgrn2_megatron.config import ATTENTION, HGRN2, HGRN2Config, UsageError, query_groups
from hgrn2_megatron.forms import gpt_pattern, stack_pattern

# Megatron's default for --make-vocab-size-divisible-by. Every usual TP size divides it.
VOCAB_MULTIPLE = 128


def _refuse(field: str, value: Any, reason: str):
    raise UsageError(f"config.json: {field} is {value!r}: {reason}")


def as_gpt(args: argparse.Namespace) -> argparse.Namespace:
    """Return the args of the GPT that computes the same function as a model of either form.

    fla's layers are those of a GPT. The `|` of a HybridModel's pattern and its heads for multi-token prediction are
    left out.

    Args:
        args: Megatron's args of a GPT, which are returned as they are, or of a HybridModel.

    Raises:
        UsageError: no GPT computes the same function.
    """
    if not is_stack_spec(args.spec):
        return args
    try:
        layers, _ = gpt_pattern(args.hybrid_layer_pattern)
    except UsageError as error:
        raise UsageError(
            f"the checkpoint cannot be converted, because fla's layers are those of a GPT: {error}"
        ) from error
    form = {"spec": [MODULE, GPT], "num_layers": len(layers), "hgrn2_layer_pattern": layers}
    return argparse.Namespace(**vars(args) | form | {"hybrid_layer_pattern": None})


def megatron_args(config: dict[str, Any]) -> argparse.Namespace:
    """Return Megatron's args of the HybridModel that a config.json describes.

    Args:
        config: content of the config.json of an HGRN2 model from any release of fla. A missing field has fla's default.

    Returns:
        The args that describe the model in a checkpoint. They include all that --use-checkpoint-args reads, and all
        that is compared on loading.

    Raises:
        UsageError: Megatron's model cannot express a field of the config. The error names the field.
    """
    c = {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000, "norm_eps": 1e-6} | config
    if c.get("model_type") != "hgrn2":
        _refuse("model_type", c.get("model_type"), "only models of the type hgrn2 can be converted")
    if c.get("use_short_conv"):
        _refuse("use_short_conv", True, "HGRN2 layers in Megatron have no short convolutions")
    if c.get("attnres_block_size") is not None:
        _refuse("attnres_block_size", c["attnres_block_size"], "HGRN2 layers in Megatron have no attention residuals")
    if c.get("hidden_act", "swish") not in ("swish", "silu"):
        _refuse(
            "hidden_act",
            c["hidden_act"],
            "the channel mixer in Megatron is a SiLU-gated linear unit; give swish or silu",
        )
    if c.get("elementwise_affine", True) is False:
        _refuse(
            "elementwise_affine",
            False,
            "the norm of the mixer in Megatron has a weight; fla's default true is the only choice",
        )
    if c.get("quantization_config"):
        _refuse(
            "quantization_config",
            c["quantization_config"],
            "quantized weights cannot be converted; give the folder of the original weights",
        )
    d, depth, vocab = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    expand = c.get("expand_ratio", 128)
    if expand is None:
        if not c.get("num_heads") or d % c["num_heads"]:
            _refuse("num_heads", c.get("num_heads"), f"without expand_ratio it must divide hidden_size, which is {d}")
        expand = d // c["num_heads"]
    attention = _attention(c.get("attn"), d, depth)
    width = c.get("intermediate_size") or glu_width(d, c.get("hidden_ratio") or 4)
    positions = c.get("max_position_embeddings", 2048)
    layers = attention["layers"]
    hgrn2 = HGRN2Config(expand_ratio=expand, lower_bounds="learned" if c.get("use_lower_bound", True) else "none")
    letters = "".join(ATTENTION if layer in layers else HGRN2 for layer in range(depth))
    pattern = stack_pattern(letters, [False] * depth)
    hgrn2_heads = hgrn2.num_heads(d)
    heads = attention.get("num_heads") or hgrn2_heads
    groups = attention.get("num_kv_heads") or heads
    dtype = str(c.get("dtype") or c.get("torch_dtype")).removeprefix("torch.")
    return argparse.Namespace(
        spec=[MODULE, STACK],
        **{f"hgrn2_{name}": value for name, value in dataclasses.asdict(hgrn2).items()},
        hybrid_layer_pattern=pattern,
        num_layers=len(pattern),
        hidden_size=d,
        ffn_hidden_size=width,
        num_attention_heads=heads,
        kv_channels=d // heads,
        group_query_attention=groups != heads,
        num_query_groups=groups,
        normalization="RMSNorm",
        layernorm_epsilon=c["norm_eps"],
        apply_layernorm_1p=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        swiglu=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # null is attention without positions in hgrn2_kernels.hf; fla refuses it
        position_embedding_type="rope" if layers and attention["rope_theta"] is not None else "none",
        add_position_embedding=True,
        rotary_base=attention.get("rope_theta") or 10000,
        rotary_percent=1.0,
        rotary_interleaved=False,
        init_method_std=c.get("initializer_range", 0.02),
        seq_length=positions,
        max_position_embeddings=positions,
        untie_embeddings_and_output_weights=not c.get("tie_word_embeddings", False),
        vocab_size=vocab,
        make_vocab_size_divisible_by=VOCAB_MULTIPLE,
        padded_vocab_size=VOCAB_MULTIPLE * -(-vocab // VOCAB_MULTIPLE),
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        # This is not the name of one of Megatron's implementations. So states that only one implementation saves start
        # fresh in a run that loads the checkpoint.
        transformer_impl="huggingface",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
    )


def _attention(attn: Any, hidden_size: int, depth: int) -> dict[str, Any]:
    """Return one description of all attention layers of a hybrid. In a pure model its "layers" are empty.

    Args:
        attn: the field `attn` of config.json: a dict, a list of dicts, or None.
        hidden_size: width of the model.
        depth: number of layers of the model.

    Raises:
        UsageError: Megatron's attention cannot express the description.
    """
    specs = [attn] if isinstance(attn, dict) else list(attn or ())
    for spec in specs:
        if not {"layers", "num_heads"} <= spec.keys() or not set(spec["layers"]) <= set(range(depth)):
            _refuse("attn", spec, f"it must name its layers, each below {depth}, and its num_heads")
    if not specs:
        return {"layers": []}
    # a field that is missing in one of several descriptions has fla's default there
    defaults = {"qkv_bias": False, "rope_theta": 10000.0}
    specs = [defaults | spec | {"num_kv_heads": spec.get("num_kv_heads") or spec["num_heads"]} for spec in specs]
    merged = specs[0] | {"layers": [layer for spec in specs for layer in spec["layers"]]}
    for spec in specs:
        for name, value in spec.items():
            if name not in ("layers", "num_heads", "num_kv_heads", "rope_theta") and value:
                _refuse(f"attn {name}", value, "attention layers of a converted model cannot have it")
            if name != "layers" and value != merged.get(name):
                _refuse(
                    f"attn {name}",
                    value,
                    f"it is {merged.get(name)} in other attention layers, and must be the same in all of them",
                )
    heads, groups = merged["num_heads"], merged["num_kv_heads"]
    if hidden_size % heads or heads % groups:
        _refuse(
            "attn num_heads",
            heads,
            f"it must divide hidden_size, {hidden_size}, and be a multiple of num_kv_heads, {groups}",
        )
    return merged


# Settings of a Megatron model that fla's format cannot express if they are set: attribute -> flag.
NOT_IN_FLA = {
    "num_experts": "--num-experts",
    "add_bias_linear": "biases of linear layers (--disable-bias-linear)",
    "use_mup": "--use-mup",
    "apply_layernorm_1p": "--apply-layernorm-1p",
    "glu_linear_offset": "--glu-linear-offset",
    "activation_func_clamp_value": "--activation-func-clamp-value",
}
NOT_IN_FLA_ATTENTION = {
    "add_qkv_bias": "--add-qkv-bias",
    "qk_layernorm": "--qk-layernorm",
    "qk_l2_norm": "--qk-l2-norm",
    "window_size": "--window-size",
    "attention_output_gate": "--attention-output-gate",
    "multi_latent_attention": "--multi-latent-attention",
    "rotary_interleaved": "--rotary-interleaved",
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
    "use_rope_scaling": "--use-rope-scaling",
    "no_rope_freq": "--no-rope-freq",
}


def hf_config(args: argparse.Namespace, vocab_size: int, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json for a Megatron model.

    Args:
        args: args of the run that saved the model, a GPT or a HybridModel.
        vocab_size: number of tokens without Megatron's padding.
        dtype: dtype of the weights: "bfloat16", "float32" or "float16".
        token_ids: ids of special tokens, such as bos_token_id, which Megatron does not know.

    Raises:
        UsageError: fla's format cannot express the model. The error names the flag.
    """
    spec = full_spec(list(getattr(args, "spec", None) or ["none"]))
    if not is_hgrn2_spec(spec):
        raise UsageError(
            f"the checkpoint has --spec {' '.join(spec or ())}: only --spec hgrn2 and --spec hgrn2_stack can be "
            "converted"
        )
    if getattr(args, "mtp_num_layers", None):
        raise UsageError(
            f"--mtp-num-layers is {args.mtp_num_layers} in the checkpoint: fla's format has no place for heads of "
            "multi-token prediction. Give --drop-mtp-heads to convert the model without them: its own logits stay as "
            "they are"
        )
    args = as_gpt(args)
    hgrn2, d = HGRN2Config.of(args), args.hidden_size
    if hgrn2.norm_eps != HGRN2Config.norm_eps:
        raise UsageError(
            f"--hgrn2-norm-eps is {hgrn2.norm_eps} in the checkpoint: fla's models always use {HGRN2Config.norm_eps}"
        )
    layers = [layer for layer in range(args.num_layers) if not hgrn2.is_hgrn2_layer(layer)]
    for name, flag in (NOT_IN_FLA | (NOT_IN_FLA_ATTENTION if layers else {})).items():
        if getattr(args, name, None):
            raise UsageError(f"{flag} is set in the checkpoint: fla's format for HGRN2 models cannot express it")
    attn = None
    if layers:
        needed = {
            "position_embedding_type": ("rope", "none"),
            "kv_channels": (d // args.num_attention_heads,),
            "rotary_percent": (1.0,),
            "softmax_type": ("vanilla",),
        }
        for name, values in needed.items():
            if getattr(args, name, None) not in (None, *values):
                raise UsageError(
                    f"--{name.replace('_', '-')} is {getattr(args, name)} in the checkpoint: it must be "
                    f"{' or '.join(map(str, values))} to be converted"
                )
        attn = {
            "layers": layers,
            "num_heads": args.num_attention_heads,
            "num_kv_heads": query_groups(args),
            "qkv_bias": False,
            "window_size": None,
            "rope_theta": None if args.position_embedding_type == "none" else float(args.rotary_base),
        }
    return {
        "architectures": ["HGRN2ForCausalLM"],
        "attn": attn,
        "attn_mode": "chunk",
        "conv_size": 4,
        "elementwise_affine": True,
        "expand_ratio": hgrn2.expand_ratio,
        "hidden_act": "swish",
        "hidden_ratio": 4,
        "hidden_size": d,
        "initializer_range": getattr(args, "init_method_std", 0.02),
        "intermediate_size": args.ffn_hidden_size,
        "max_position_embeddings": args.max_position_embeddings or args.seq_length,
        "model_type": "hgrn2",
        "norm_eps": args.layernorm_epsilon,
        "num_heads": hgrn2.num_heads(d),
        "num_hidden_layers": args.num_layers,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_lower_bound": hgrn2.lower_bounds == "learned",
        "use_short_conv": False,
        "vocab_size": vocab_size,
        **token_ids,
    }
