"""An HGRN2 language model in plain PyTorch, written from fla's definition and the paper, sharing no code with ours.

Source: arXiv 2404.07904; fla-org/flash-linear-attention, fla/models/hgrn2/modeling_hgrn2.py, fla/layers/hgrn2.py.
Weights carry the names of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def lower_bounds(gamma: Tensor) -> Tensor:
    """[L, d] learned -> [L, d] bounds, zero in the first layer."""
    p = torch.softmax(gamma, dim=0)
    return torch.cumsum(p, dim=0) - p[0]


def token_mixer(x: Tensor, w: dict[str, Tensor], bound: Tensor, head_dim: int) -> Tensor:
    """x: [batch, time, d]; the recurrence is stepped token by token."""
    batch, time, d = x.shape
    q = F.silu(x @ w["attn.q_proj.weight"].T)
    forget = bound + (1 - bound) * torch.sigmoid(x @ w["attn.f_proj.weight"].T)
    k = 1 - forget
    i = x @ w["attn.i_proj.weight"].T
    heads = d // head_dim
    state = x.new_zeros(batch, heads, head_dim, head_dim)
    outputs = []
    for t in range(time):
        at = lambda y: y[:, t].view(batch, heads, head_dim)  # noqa: B023, E731
        state = at(forget)[..., None] * state + at(k)[..., None] * at(i)[..., None, :]
        outputs.append((at(q)[..., None] * state).sum(-2).reshape(batch, d) * head_dim**-0.5)
    o = rms_norm(torch.stack(outputs, 1), w["attn.g_norm.weight"], 1e-5)
    return o @ w["attn.o_proj.weight"].T


def channel_mixer(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    y = rms_norm(x, w["mlp_norm.weight"], 1e-6)
    y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    return x + y @ w["mlp.down_proj.weight"].T


def block(x: Tensor, w: dict[str, Tensor], bound: Tensor, head_dim: int) -> Tensor:
    """x: [batch, time, d]; w: weights of the layer, named without its prefix."""
    x = x + token_mixer(rms_norm(x, w["attn_norm.weight"], 1e-6), w, bound, head_dim)
    return channel_mixer(x, w)


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}


def hidden(weights: dict[str, Tensor], tokens: Tensor, num_layers: int, head_dim: int) -> Tensor:
    """tokens [batch, time] -> [batch, time, d], the input of the output layer."""
    bounds = lower_bounds(weights["model.lower_bounds"])
    x = weights["model.embeddings.weight"][tokens]
    for layer in range(num_layers):
        x = block(x, under(f"model.layers.{layer}.", weights), bounds[layer], head_dim)
    return rms_norm(x, weights["model.norm.weight"], 1e-6)


def logits(weights: dict[str, Tensor], tokens: Tensor, num_layers: int, head_dim: int) -> Tensor:
    """tokens [batch, time] -> [batch, time, vocab]."""
    return hidden(weights, tokens, num_layers, head_dim) @ weights["lm_head.weight"].T


def from_megatron(ours: dict[str, Tensor], num_layers: int, head_dim: int) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under the published names; in_proj's rows go q, f, i head by head."""
    theirs = {
        "model.embeddings.weight": ours["embedding.word_embeddings.weight"],
        "model.lower_bounds": ours["decoder.hgrn2_bounds.weight"].view(num_layers, -1),
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(num_layers):
        w = layer_from_megatron(under(f"decoder.layers.{layer}.", ours), head_dim)
        theirs |= {f"model.layers.{layer}.{name}": x for name, x in w.items()}
    return theirs


def layer_from_megatron(ours: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The parameters of one of our layers under the published names, without a prefix; attention has its own."""
    gate, up = ours["mlp.linear_fc1.weight"].chunk(2)
    theirs = {
        "attn_norm.weight": ours["input_layernorm.weight"],
        "mlp_norm.weight": ours["pre_mlp_layernorm.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": ours["mlp.linear_fc2.weight"],
    }
    if "self_attention.in_proj.weight" not in ours:
        return theirs | {name: x for name, x in ours.items() if name.startswith("self_attention.")}
    by_head = ours["self_attention.in_proj.weight"].unflatten(0, (-1, 3, head_dim))
    theirs |= {f"attn.{name}_proj.weight": by_head[:, part].flatten(0, 1) for part, name in enumerate("qfi")}
    theirs["attn.g_norm.weight"] = ours["self_attention.norm.weight"]
    theirs["attn.o_proj.weight"] = ours["self_attention.out_proj.weight"]
    return theirs
