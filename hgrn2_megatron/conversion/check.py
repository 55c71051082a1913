"""Check of a conversion: it compares the logits of the Hugging Face folder and of the Megatron checkpoint.

Both sides get the same tokens. The logits of the Hugging Face folder come from fla's model, written here in plain
PyTorch with a recurrence over single tokens. Its attention layers may be without positions. The logits of the
checkpoint come from Megatron's model.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_kernels import recurrent_hgrn2
from hgrn2_megatron import cpu
from hgrn2_megatron.arguments import BLOCK, HGRN2TransformerConfig, is_stack_spec
from hgrn2_megatron.config import HGRN2Config, UsageError, query_groups
from hgrn2_megatron.conversion.config import as_gpt, megatron_args
from hgrn2_megatron.conversion.files import HFTensors, checkpoint_folder, read_args, read_json
from hgrn2_megatron.forms import Layers

BATCH, TIME = 2, 40
# largest difference that passes, relative to the largest logit; both sides compute in fp32
TOLERANCE = 1e-3


def compare(hf: Path, megatron: Path, weight_dtype: torch.dtype | None = None) -> str:
    """Compare the logits of both models, and return one line that says by how much they differ.

    Args:
        hf: folder with config.json and safetensors files.
        megatron: folder that `--load` takes, or the folder of one iteration.
        weight_dtype: dtype to which the conversion rounded the weights, or None if it kept the dtype of each weight.
            The weights of both sides are rounded to it, so that this rounding does not count as a difference.

    Raises:
        UsageError: the logits differ by more than rounding errors.
    """
    model = megatron_args(read_json(hf / "config.json"))
    tensors = HFTensors(hf, model.ffn_hidden_size)
    tokens = torch.randint(model.vocab_size, (BATCH, TIME), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hf_output = hf_logits(model, lambda name: _rounded(tensors.read(name), weight_dtype).float(), tokens)
    megatron_output = megatron_logits(megatron, tokens, weight_dtype=weight_dtype)[..., : model.vocab_size]
    difference, largest = (megatron_output - hf_output).abs().max().item(), hf_output.abs().max().item()
    line = f"logits of {BATCH} x {TIME} tokens differ by at most {difference:.1e}, the largest is {largest:.1e}"
    if not difference <= TOLERANCE * largest:
        raise UsageError(
            f"{hf} and {megatron} are different models: {line}; a difference of up to {TOLERANCE:.0e} of the largest "
            "logit would pass. Do not use the converted folder"
        )
    return line


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def hf_logits(args: argparse.Namespace, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """Compute the logits of fla's HGRN2ForCausalLM in plain PyTorch.

    Args:
        args: model settings, as `megatron_args` reads them from config.json.
        read: function that returns the weight of a name in fp32.
        tokens: [B, T] int64.

    Returns:
        logits: [B, T, vocab] fp32.
    """
    args = as_gpt(args)
    hgrn2, d = HGRN2Config.of(args), args.hidden_size
    bounds: list[Tensor | None] = [None] * args.num_layers
    if hgrn2.lower_bounds == "learned":
        p = read("model.lower_bounds").softmax(0)
        bounds = [*(p.cumsum(0) - p[0]).unflatten(1, (-1, hgrn2.expand_ratio))]
    x = read("model.embeddings.weight")[tokens]
    for layer, bound in enumerate(bounds):

        def linear(name, x, layer=layer):
            return F.linear(x, read(f"model.layers.{layer}.{name}_proj.weight"))

        def norm(name, x, eps=args.layernorm_epsilon, layer=layer):
            return F.rms_norm(x, (d,), read(f"model.layers.{layer}.{name}_norm.weight"), eps)

        y = norm("attn", x)
        if hgrn2.is_hgrn2_layer(layer):
            q, f, v = (linear(f"attn.{name}", y).unflatten(2, (-1, hgrn2.expand_ratio)) for name in "qfi")
            y = norm("attn.g", recurrent_hgrn2(q, f, v, bound)[0].flatten(2), hgrn2.norm_eps)
        else:
            q, k, v = (linear(f"attn.{name}", y).unflatten(2, (-1, args.kv_channels)).transpose(1, 2) for name in "qkv")
            if args.position_embedding_type == "rope":
                q, k = (_rotate(part, args.rotary_base) for part in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + linear("attn.o", y)
        y = norm("mlp", x)
        x = x + linear("mlp.down", F.silu(linear("mlp.gate", y)) * linear("mlp.up", y))
    x = F.rms_norm(x, (d,), read("model.norm.weight"), args.layernorm_epsilon)
    head = "lm_head.weight" if args.untie_embeddings_and_output_weights else "model.embeddings.weight"
    return F.linear(x, read(head))


def _rotate(x: Tensor, base: float) -> Tensor:
    """Apply rotary position embeddings to x [B, H, T, D], which rotate channel j together with channel j + D/2."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * base ** -(torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def megatron_logits(
    checkpoint: Path, tokens: Tensor, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None
) -> Tensor:
    """Compute the logits of Megatron's model from a torch_dist checkpoint, in one process, on a GPU if there is one.

    The model is a GPT or a HybridModel, as the checkpoint says, without heads for multi-token prediction.

    Args:
        checkpoint: folder that `--load` takes, or the folder of one iteration.
        tokens: [B, T] int64.
        dtype: dtype of the model and its arithmetic, fp32 or bf16.
        weight_dtype: dtype to which the weights are rounded first; None takes them as they are saved.

    Returns:
        logits: [B, T, padded vocabulary] fp32, on the CPU.

    Raises:
        UsageError: the folder is not a complete checkpoint, or does not describe its model.
    """
    cpu.install()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from hgrn2_megatron.checkpoint import adapt
    from hgrn2_megatron.spec import hgrn2, hgrn2_stack

    folder = checkpoint_folder(checkpoint)
    args = read_args(folder)
    hgrn2_config, num_layers = HGRN2Config.of(args), args.num_layers
    form = functools.partial(GPTModel, transformer_layer_spec=hgrn2)
    if is_stack_spec(args.spec):
        pattern = Layers.of(args).symbols
        form = functools.partial(HybridModel, hybrid_stack_spec=hgrn2_stack, hybrid_layer_pattern=pattern)
        num_layers = len(pattern)
    backend = "gloo" if cpu.needed() else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    settings = BLOCK | dict(normalization=args.normalization, layernorm_epsilon=args.layernorm_epsilon)
    config = HGRN2TransformerConfig(
        **settings,
        num_layers=num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=query_groups(args),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **{f"hgrn2_{name}": value for name, value in vars(hgrn2_config).items()},
    )
    model = form(
        config=config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=tokens.shape[1],
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    wanted = {"model": model.sharded_state_dict()}
    # The checkpoint may lack FP8 states that this model wants. `adapt` removes them from `wanted` only if the two runs
    # have different implementations, so they get different names here.
    here, saved = (argparse.Namespace(spec=args.spec, transformer_impl=name) for name in ("local", "another"))
    adapt(here, wanted, saved, str(folder))
    model.load_state_dict(dist_checkpointing.load(wanted, str(folder))["model"])
    for p in model.parameters():
        p.data = _rounded(p.data, weight_dtype)
    b, s = tokens.shape
    causal = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1).cuda()
    positions = torch.arange(s).expand(b, -1)
    with torch.inference_mode():
        logits = model.to("cuda", dtype).eval()(tokens.cuda(), positions.cuda(), causal)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return logits.float().cpu()
