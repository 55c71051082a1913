"""Put this package's operator into the HGRN2 layers of fla (flash-linear-attention), with one call, and take it out.

    from hgrn2_kernels import for_fla
    for_fla.replace(model)              # the layers of this model
    for_fla.restore(model)              # fla's operator again

Only this module of the package imports fla. fla's projections, short convolutions, norm, cache and padding stay in use.
Two things are replaced: fla's computation of the gates, and the operator after it.
"""

import inspect

import fla
import torch
from fla.layers import hgrn2 as fla_layer
from torch import Tensor, nn

from hgrn2_kernels.op import chunk_hgrn2
from hgrn2_kernels.step import step_hgrn2

RELEASES = ("0.6.0",)
# The names in fla.layers.hgrn2 that this module relies on, and the first parameters that each must have. The last two
# are the operators that are replaced: their state_v_first says how the states in the cache lie.
PARAMETERS = {
    "HGRN2Attention.forward": "self hidden_states attention_mask past_key_values use_cache output_attentions "
    "lower_bound kwargs",
    "get_layer_cache": "module past_key_values",
    "update_layer_cache": "module past_key_values kwargs",
    "unpad_hidden_states": "hidden_states cu_seqlens attention_mask q_len",
    "repad_hidden_states": "hidden_states indices batch_size q_len",
    "rms_norm_linear": "x norm_weight norm_bias linear_weight linear_bias",
    "chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens",
    "fused_recurrent_gla": "q k v gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens",
}
FLA_FORWARD = fla_layer.HGRN2Attention.forward


def replace(target: nn.Module | type) -> None:
    """Let HGRN2 layers of fla compute with `chunk_hgrn2` and `step_hgrn2`. A second call changes nothing.

    Weights, the cache and the results of `forward` keep their names and shapes. Call this before anything else replaces
    the `forward` of a layer, such as accelerate with a `device_map` of several devices.

    Args:
        target: a model, or one layer: only its layers change. Or the class `fla.layers.HGRN2Attention`: all layers of
            the process change, existing and future ones.

    Raises:
        RuntimeError: fla's release or a signature in it is unknown, or a layer is not exactly fla's. Nothing has been
            changed then.
        ValueError: the model has no HGRN2 layer of fla.
        TypeError: target is neither a module nor the class.
    """
    check_fla()
    if target is fla_layer.HGRN2Attention:
        target.forward = forward
        return
    layers = _layers(target)
    for layer in layers:
        _check_layer(layer)
    for layer in layers:
        layer.__class__ = KernelHGRN2Attention


def restore(target: nn.Module | type) -> None:
    """Undo `replace` for the same target. The layers then run the code of fla that they ran before.

    Raises:
        ValueError: `replace` was not called for this target.
        TypeError: target is neither a module nor the class.
    """
    if target is fla_layer.HGRN2Attention:
        if target.forward is not forward:
            raise ValueError("HGRN2Attention was not replaced: if the layers of one model were, pass this model")
        target.forward = FLA_FORWARD
        return
    replaced = [layer for layer in _layers(target) if type(layer) is KernelHGRN2Attention]
    if not replaced:
        raise ValueError("no layer of this model was replaced: if the class was, pass fla.layers.HGRN2Attention")
    for layer in replaced:
        layer.__class__ = fla_layer.HGRN2Attention


def check_fla() -> None:
    """Check that fla is a release that this module knows.

    Raises:
        RuntimeError: the release is unknown, or a function that this module uses or replaces is missing or takes other
            parameters.
    """
    advice = f"hgrn2_kernels.for_fla knows flash-linear-attention {' and '.join(RELEASES)}: install it, or do without"
    if fla.__version__ not in RELEASES:
        raise RuntimeError(f"fla is {fla.__version__}. {advice}")
    for name, expected in PARAMETERS.items():
        function = fla_layer
        for part in name.split("."):
            function = getattr(function, part, None)
        if function is None:
            raise RuntimeError(f"fla.layers.hgrn2 has no {name}. {advice}")
        found = list(inspect.signature(function).parameters)
        if found[: len(expected.split())] != expected.split():
            raise RuntimeError(f"{name} of fla has the parameters {found}, expected {expected.split()}. {advice}")
    if fla_layer.HGRN2Attention.forward not in (FLA_FORWARD, forward):
        raise RuntimeError(
            "HGRN2Attention.forward is not fla's own: something else has replaced it. Undo that before for_fla.replace"
        )


def forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    lower_bound: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None, object]:
    """Run the layer as `HGRN2Attention.forward` does, with this package's operator.

    Args:
        self: the layer of fla.
        hidden_states: [B, T, hidden size].
        attention_mask: [B, T], or [B, tokens so far] with a cache, 1 for a token and 0 for padding. None means that
            there is no padding.
        past_key_values: fla's cache, or None. Its recurrent state is [B, H, V, K] fp32.
        use_cache: whether to return the final state in the cache.
        output_attentions: has no effect, as in fla.
        lower_bound: [H * K] bound of the forget gate. The first layer of a model does not use it.
        kwargs: `cu_seqlens`, [N + 1] integers, boundaries of packed sequences. They override attention_mask. Other
            arguments have no effect.

    Returns:
        The output [B, T, hidden size], None in the place of attention weights, and the cache.

    Raises:
        ValueError: the mask has another shape, or `chunk_hgrn2` or `step_hgrn2` raises.

    Source:
        fla-org/flash-linear-attention 0.6.0, fla/layers/hgrn2.py, for the order of the steps and the cache.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens] with 0 for padding, got {list(attention_mask.shape)}: pass "
            "cu_seqlens to separate sequences"
        )
    batch, tokens, _ = hidden_states.shape
    cached = fla_layer.get_layer_cache(self, past_key_values)
    x, indices, cu_seqlens = fla_layer.unpad_hidden_states(
        hidden_states, kwargs.get("cu_seqlens"), attention_mask, tokens
    )
    (q, f, v), conv_state = _project(self, x, cached, use_cache, cu_seqlens)
    q, f, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, f, v))
    bound = None
    if lower_bound is not None and self.layer_idx > 0:
        bound = lower_bound.to(torch.float64 if q.dtype == torch.float64 else torch.float32).view(q.shape[2:])
    state = None if cached is None else cached["recurrent_state"]
    # With padding, x holds only tokens. One for each row of the batch means that every row goes on.
    one_each = tokens == 1 and x.shape[0] * x.shape[1] == batch
    if state is not None and one_each and kwargs.get("cu_seqlens") is None and not torch.is_grad_enabled():
        o, state = _step(q, f, v, bound, state)
    else:
        o, state = _chunk(q, f, v, bound, state, cu_seqlens, use_cache)
    fla_layer.update_layer_cache(self, past_key_values, recurrent_state=state, conv_state=conv_state, offset=tokens)
    o = o.flatten(-2)
    if type(self.o_proj) is nn.Linear:
        o = fla_layer.rms_norm_linear(o, self.g_norm.weight, self.g_norm.bias, self.o_proj.weight, self.o_proj.bias)
    else:
        # fla would read only the weight, and leave out an adapter such as LoRA
        o = self.o_proj(self.g_norm(o))
    return fla_layer.repad_hidden_states(o, indices, batch, tokens), None, past_key_values


class KernelHGRN2Attention(fla_layer.HGRN2Attention):
    """fla's HGRN2 layer with this package's operator. `replace` gives this class to the layers of a model."""

    forward = forward


def _project(layer, x, cached, use_cache, cu_seqlens):
    """Return the projections q, f and v of x, and the states of their convolutions or None."""
    projected = [projection(x) for projection in (layer.q_proj, layer.f_proj, layer.i_proj)]
    if not layer.use_short_conv:
        return projected, None
    states = (None, None, None) if cached is None else cached["conv_state"]
    convolutions = layer.q_conv1d, layer.f_conv1d, layer.i_conv1d
    results = [
        convolution(x=y, cache=state, output_final_state=use_cache, cu_seqlens=cu_seqlens)
        for convolution, y, state in zip(convolutions, projected, states, strict=True)
    ]
    projected, states = zip(*results, strict=True)
    return projected, states


def _chunk(q, f, v, bound, state, cu_seqlens, use_cache):
    """Run the operator over any number of tokens. States are [N, H, V, K], as in fla's cache."""
    o, state = chunk_hgrn2(
        q,
        f,
        v,
        bound,
        initial_state=None if state is None else state.mT,
        output_final_state=bool(use_cache),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.int(),
        save_states=True,
    )
    return o, None if state is None else state.mT


def _step(q, f, v, bound, state):
    """Advance each sequence by one token. States are [N, H, V, K], and the given ones stay as they are.

    fla never changes a cached state in place, so callers may share it among several continuations.
    """
    state = state.mT.clone(memory_format=torch.contiguous_format)
    o = step_hgrn2(*(x.reshape(-1, 1, *x.shape[2:]) for x in (q, f, v)), bound, state)
    return o.view(v.shape), state.mT


def _layers(target) -> list[nn.Module]:
    """Return the HGRN2 layers of fla in a module, with the module itself."""
    if not isinstance(target, nn.Module):
        raise TypeError(f"the target must be a model, a layer or the class fla.layers.HGRN2Attention, got {target!r}")
    layers = [module for module in target.modules() if isinstance(module, fla_layer.HGRN2Attention)]
    if not layers:
        raise ValueError(f"{type(target).__name__} has no HGRN2Attention of fla: pass a model that has one")
    return layers


def _check_layer(layer):
    """Raise a RuntimeError if another class or another function has taken over the layer's forward."""
    if type(layer) not in (fla_layer.HGRN2Attention, KernelHGRN2Attention):
        raise RuntimeError(
            f"{type(layer).__name__} derives from HGRN2Attention and may compute something else: pass "
            "only layers of fla's own class"
        )
    if "forward" in vars(layer):
        raise RuntimeError(
            f"the forward of layer {layer.layer_idx} has been replaced by something else, such as a hook of "
            "accelerate, which would go on calling fla's: call for_fla.replace before that"
        )
