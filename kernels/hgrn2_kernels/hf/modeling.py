"""HGRN2Model and HGRN2ForCausalLM: HGRN2 language models for transformers, with the weight names of fla.

Source: fla-org/flash-linear-attention 0.6.0, fla/models/hgrn2/modeling_hgrn2.py; arXiv 2404.07904.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hgrn2_kernels.hf.configuration import HGRN2Config
from hgrn2_kernels.hf.mixers import Attention, HGRN2Mixer
from hgrn2_kernels.hf.packing import boundaries, check_packing, padding_of, positions_of

HGRN2 = "linear_attention"


def tokens_in(cache: Cache | None) -> int:
    """Return the number of tokens that a cache has seen. transformers counts them in attention layers only."""
    if cache is None:
        return 0
    if not all(cache.is_linear):
        return cache.get_seq_length()
    return getattr(cache, "hgrn2_tokens", 0) if cache.has_previous_state() else 0


class HGRN2MLP(nn.Module):
    """The gated MLP of a layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: HGRN2Config):
        super().__init__()
        d, width = config.hidden_size, config.mlp_width
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HGRN2Block(GradientCheckpointingLayer):
    """A layer: a token mixer and an MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: HGRN2Config, layer_idx: int):
        super().__init__()
        self.is_hgrn2 = config.attention_of(layer_idx) is None
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = (HGRN2Mixer if self.is_hgrn2 else Attention)(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = HGRN2MLP(config)

    def forward(self, hidden_states: Tensor, lower_bound, mask, positions, cu_seqlens, cache=None, **kwargs) -> Tensor:
        """Compute the layer. `mask` is the padding [B, T] of an HGRN2 layer, or the mask of an attention layer."""
        x = self.attn_norm(hidden_states)
        if self.is_hgrn2:
            x = self.attn(x, lower_bound, mask, cu_seqlens, cache)
        else:
            x, _ = self.attn(x, mask, positions, cache, **kwargs)
        x = hidden_states + x
        return x + self.mlp(self.mlp_norm(x))


class HGRN2PreTrainedModel(PreTrainedModel):
    """Settings of both models that transformers reads."""

    config_class = HGRN2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embeddings"
    _no_split_modules = ["HGRN2Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # a state cannot go back by some tokens, which assisted generation needs
    _is_stateful = True
    _can_record_outputs = {"hidden_states": HGRN2Block, "attentions": Attention}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HGRN2Model) and module.lower_bounds is not None:
            init.zeros_(module.lower_bounds)


class HGRN2Model(HGRN2PreTrainedModel):
    """An HGRN2 model without its output layer.

    Args:
        config: settings of the model.
    """

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        depth, d = config.num_hidden_layers, config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, d, config.pad_token_id)
        self.lower_bounds: nn.Parameter | None
        self.register_parameter("lower_bounds", nn.Parameter(torch.zeros(depth, d)) if config.use_lower_bound else None)
        self.layers = nn.ModuleList([HGRN2Block(config, layer) for layer in range(depth)])
        self.norm = nn.RMSNorm(d, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Compute the last hidden states.

        Several sequences can be packed behind each other. Then give `position_ids` that begin again with each
        sequence, or `cu_seqlens`, and neither a mask nor a cache.

        The states in a cache are constants for autograd, as in truncated backpropagation through time. The keys and
        values of attention layers are not.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, S] with 1 at tokens and 0 at padding on either side. S is T plus the
                number of tokens in the cache.
            position_ids: [B or 1, T] int64, position of each token in its sequence. Only attention layers read their
                values.
            cache: cache of the tokens before.
            inputs_embeds: [B, T, hidden_size], instead of input_ids.
            use_cache: whether to return a cache. None means the config's choice, and no cache in training.
            cu_seqlens: [N + 1] int32, boundaries of packed sequences in a batch of one row.
            kwargs: what the attention functions of transformers take.

        Raises:
            ValueError: the arguments contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        check_packing(position_ids, cu_seqlens, kwargs)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "gradient checkpointing computes each layer twice, which would advance the states in the cache "
                    "twice: give no cache, or call model.gradient_checkpointing_disable() or model.eval()"
                )
            use_cache = False
        if cu_seqlens is not None:
            if B != 1 or attention_mask is not None or cache is not None:
                raise ValueError(
                    f"cu_seqlens needs a batch of one row without attention_mask and without a cache, and the batch "
                    f"has {B} rows: pack the sequences behind each other, and drop the other two arguments"
                )
            position_ids = positions_of(cu_seqlens, T)
        elif position_ids is not None and attention_mask is None and cache is None:
            cu_seqlens = boundaries(position_ids, B)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if use_cache and cache is None:
            if cu_seqlens is not None:
                raise ValueError("packed sequences have no cache: give use_cache=False, or one sequence per row")
            cache = DynamicCache(config=self.config)
        kinds = self.config.layer_types
        seen = tokens_in(cache)
        if position_ids is None:
            position_ids = torch.arange(T, device=x.device)[None] + seen
        masks = self._masks(x, attention_mask, position_ids, cache)
        bounds = self._bounds()
        for layer, kind, bound in zip(self.layers, kinds, bounds, strict=True):
            x = layer(x, bound, masks[kind], position_ids, cu_seqlens, cache=cache, **kwargs)
        if cache is not None and all(cache.is_linear):
            cache.hgrn2_tokens = seen + T  # type: ignore[attr-defined]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)

    def _masks(self, x: Tensor, attention_mask, position_ids: Tensor, cache: Cache | None) -> dict:
        """Return the mask of each kind of layer. That of HGRN2 layers is True at padding.

        Raises:
            ValueError: the mask is not one of padding.
        """
        masks = attention_mask
        if not isinstance(masks, dict):
            if masks is not None and masks.dim() != 2:
                raise ValueError(
                    f"attention_mask has {masks.dim()} dimensions: HGRN2 layers see all tokens before a token, so give "
                    "a mask [batch, time] with 1 at tokens and 0 at padding"
                )
            masks = {
                kind: LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
                    config=self.config,
                    inputs_embeds=x,
                    attention_mask=attention_mask,
                    cache=cache,
                    position_ids=position_ids,
                )
                for kind in set(self.config.layer_types) - {HGRN2}
            }
            masks[HGRN2] = padding_of(attention_mask, x.shape[1])
        mask = masks.get(HGRN2)
        return masks | {HGRN2: None if mask is None else mask == 0}

    def _bounds(self) -> list[Tensor | None]:
        """Return the lower bound [H, K] of each layer, in fp32 or fp64. The first layer has none."""
        depth = self.config.num_hidden_layers
        if self.lower_bounds is None:
            return [None] * depth
        p = self.lower_bounds.softmax(0, torch.promote_types(self.lower_bounds.dtype, torch.float32))
        bounds = (p.cumsum(0) - p[0]).unflatten(1, (-1, self.config.expand_ratio))
        return [None, *bounds[1:]]


class HGRN2ForCausalLM(HGRN2PreTrainedModel, GenerationMixin):
    """An HGRN2 language model.

    Args:
        config: settings of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        self.model = HGRN2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs) -> dict:
        """Return the mask of each kind of layer. transformers itself would leave out that of a single token."""
        masks = create_masks_for_generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return masks | {HGRN2: padding_of(attention_mask, inputs_embeds.shape[1])}

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """Leave out the tokens that the cache of a pure model has seen. transformers does it for other caches.

        transformers reads from the arguments' names that a prompt of embeddings is taken.
        """
        if is_first_iteration and next_sequence_length is None:
            prompt = input_ids if inputs_embeds is None else inputs_embeds
            seen, length = tokens_in(cache), prompt.shape[1]
            if 0 < seen < length and (attention_mask is None or attention_mask.shape[1] == length):
                next_sequence_length = length - seen
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Args:
            labels: [B, T] int64, the tokens themselves, which are shifted here, with -100 where there is no loss.
            logits_to_keep: number of last tokens to compute logits of, or their indices. 0 means all tokens.
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, cu_seqlens: as in `HGRN2Model`.
            kwargs: what the loss of transformers and its attention functions take.

        Raises:
            ValueError: the arguments contradict each other, or the config asks for a loss that is not supported.
        """
        if labels is not None and self.config.use_l2warp:
            raise ValueError(
                "use_l2warp is true, and the penalty on large logits is not supported here: train with fla, or set "
                "model.config.use_l2warp = False"
            )
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, cu_seqlens, **kwargs
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
