"""The token mixers of a layer: the HGRN2 mixer, and the attention of hybrid models.

Source: fla-org/flash-linear-attention 0.6.0, fla/layers/hgrn2.py and fla/layers/attn.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from hgrn2_kernels import chunk_hgrn2, step_hgrn2
from hgrn2_kernels.hf.configuration import HGRN2Config

# fla's models use this epsilon whatever `norm_eps` says
MIXER_NORM_EPS = 1e-5
# A raw forget gate at which the gate is 1 and the key 0 in every dtype. It keeps a state over padding.
KEEP = 1e4


class MixerRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight takes the dtype of its input. Under autocast the two differ, and PyTorch would be slow."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class HGRN2Mixer(nn.Module):
    """The HGRN2 token mixer: projections, the operator, a norm over the whole width, and the output projection.

    Args:
        config: settings of the model.
        layer_idx: number of the layer, counted from 0.
    """

    def __init__(self, config: HGRN2Config, layer_idx: int):
        super().__init__()
        d = config.hidden_size
        self.layer_idx, self.head_dim = layer_idx, config.expand_ratio
        self.q_proj, self.f_proj, self.i_proj = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.g_norm = MixerRMSNorm(d, MIXER_NORM_EPS, elementwise_affine=config.elementwise_affine is not False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(
        self,
        x: Tensor,
        lower_bound: Tensor | None,
        is_padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix tokens, and update the state of this layer in the cache.

        Args:
            x: [B, T, d].
            lower_bound: [H, K] fp32, or None for a bound of 0.
            is_padding: [B, T] bool. Padding leaves the state as it is.
            cu_seqlens: [N + 1] int32, boundaries of sequences that are packed into the B * T tokens.
            cache: cache of all layers. The states in it go on from its last token.

        Returns:
            [B, T, d].
        """
        B, T, _ = x.shape
        q, f, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.f_proj, self.i_proj))
        if is_padding is not None:
            f = f.masked_fill(is_padding[..., None, None], KEEP)
        if cu_seqlens is not None:
            q, f, v = (part.reshape(1, B * T, *part.shape[2:]) for part in (q, f, v))
        o = self._operator(q, f, v, lower_bound, cu_seqlens, cache)
        return self.o_proj(self.g_norm(o.reshape(B, T, -1)))

    def _operator(self, q, f, v, lower_bound, cu_seqlens, cache: Cache | None) -> Tensor:
        """Run the operator from the state in the cache, and leave the new state there."""
        if cache is None:
            return chunk_hgrn2(q, f, v, lower_bound, cu_seqlens=cu_seqlens, save_states=True)[0]
        state = cache.get_recurrent_state(self.layer_idx)
        if state is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            return step_hgrn2(q, f, v, lower_bound, state)
        if state is not None and torch.is_grad_enabled():
            # the backward needs this state, and the cache gets the next one in its place
            state = state.clone()
        o, final = chunk_hgrn2(q, f, v, lower_bound, initial_state=state, output_final_state=True)
        layer = cache.layers[self.layer_idx]
        assert final is not None and isinstance(layer, LinearAttentionLayer)
        layer.update_recurrent_state(final.detach())
        # transformers itself sets this only in layers with a convolution
        layer.has_previous_state[0] = True
        return o


class Attention(nn.Module):
    """Causal attention with rotary positions, as fla's hybrid models have it, or without positions.

    Args:
        config: settings of the model. Its `attn` describes this layer.
        layer_idx: number of the layer, counted from 0.
    """

    is_causal = True

    def __init__(self, config: HGRN2Config, layer_idx: int):
        super().__init__()
        spec, d = config.attention_of(layer_idx), config.hidden_size
        assert spec is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = d // spec["num_heads"]
        self.num_key_value_groups = spec["num_heads"] // spec["num_kv_heads"]
        self.rope_theta, self.sliding_window = spec["rope_theta"], spec["window_size"]
        width, bias = spec["num_kv_heads"] * self.head_dim, spec["qkv_bias"]
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, width, bias=bias)
        self.v_proj = nn.Linear(d, width, bias=bias)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens, and add their keys and values to the cache.

        Args:
            x: [B, T, d].
            mask: mask of transformers for its attention function.
            positions: [B or 1, T] int64, position of each token in its sequence.
            cache: cache of all layers.
            kwargs: what the attention functions of transformers take, such as boundaries of packed sequences.

        Returns:
            output: [B, T, d].
            weights: [B, heads, T, S] if the attention function returns them, or else None.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in projections)
        if self.rope_theta is not None:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        scale = self.head_dim**-0.5
        o, weights = attend(
            self, q, k, v, mask, dropout=0.0, scaling=scale, sliding_window=self.sliding_window, **kwargs
        )
        return self.o_proj(o.flatten(2)), weights

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate channel j of x [B, H, T, D] together with channel j + D/2, in fp32."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = positions[:, None, :, None] * frequencies
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(x.dtype)
