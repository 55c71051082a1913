"""HGRN2Config: the settings of an HGRN2 model in fla's format, and the checks of their values."""

from typing import Any

from transformers import PreTrainedConfig

# what a field of `attn` is if it is missing; fla has the same defaults
ATTENTION_DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}


class HGRN2Config(PreTrainedConfig):
    """Settings of an HGRN2 model, pure or with attention layers. Names and defaults are fla's.

    The fields `attn_mode`, `conv_size` and those that begin with `fuse_` are kept for fla. They change nothing here.

    Attributes:
        hidden_size: width of the model.
        num_hidden_layers: number of layers. A layer is a token mixer and a gated MLP, each with its norm.
        expand_ratio: number K of key and gate channels per head. An HGRN2 layer has hidden_size / K heads. None means
            hidden_size / num_heads.
        num_heads: number of heads of an HGRN2 layer. It is not read if expand_ratio is given.
        use_lower_bound: whether the forget gates have learned lower bounds.
        intermediate_size: width of the MLP. None means 2/3 of hidden_ratio * hidden_size, rounded up to a multiple of
            256.
        hidden_act: "swish" or its other name "silu", which becomes "swish".
        elementwise_affine: whether the norm of an HGRN2 layer has a weight.
        norm_eps: epsilon of all norms except that of an HGRN2 layer, which has 1e-5 as in fla.
        attn: the attention layers, a dict or a list of dicts with the keys `layers` (a list of layers, counted from 0),
            `num_heads`, `num_kv_heads`, `qkv_bias`, `window_size` (number of tokens that a token sees, with itself;
            None means all) and `rope_theta` (base of the rotary positions; None means no positions, which fla
            refuses). None instead of the dict means that all layers are HGRN2 layers.
        use_l2warp: whether fla adds a penalty on large logits to the gradient of the loss. There is none here, so a
            loss is refused as long as the field is true.

    Raises:
        ValueError: a field has a value that no model can have, or that this package does not compute. The message
            names the field.

    Source: fla-org/flash-linear-attention 0.6.0, fla/models/hgrn2/configuration_hgrn2.py.
    """

    model_type = "hgrn2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    attn_mode: str = "chunk"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    max_position_embeddings: int = 2048
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6
    attn: dict | list | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    vocab_size: int = 32000
    attnres_block_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.use_short_conv:
            _refuse("use_short_conv", True, "short convolutions are not supported here; load the model with fla")
        if self.attnres_block_size is not None:
            _refuse(
                "attnres_block_size",
                self.attnres_block_size,
                "attention residuals are not supported here; load the model with fla",
            )
        if self.hidden_act not in ("swish", "silu"):
            _refuse("hidden_act", self.hidden_act, "the gated MLP has SiLU here; give 'swish', or load it with fla")
        self.hidden_act = "swish"
        d = self.hidden_size
        if self.expand_ratio is None:
            if not self.num_heads or d % self.num_heads:
                _refuse("num_heads", self.num_heads, f"without expand_ratio it must divide hidden_size {d}; change it")
            self.expand_ratio = d // self.num_heads
        if self.expand_ratio < 1 or d % self.expand_ratio:
            _refuse("expand_ratio", self.expand_ratio, f"it must divide hidden_size {d}; change one of the two")
        if self.num_heads is None:
            self.num_heads = d // self.expand_ratio
        self.attn = self._checked(self.attn)
        # this reads the properties below, so the fields must be complete
        super().__post_init__(**kwargs)

    def _checked(self, attn: Any) -> dict | list | None:
        """Return `attn` with all of its fields.

        Raises:
            ValueError: a field is missing or cannot be as it is.
        """
        if not attn:
            return None
        specs = [attn] if isinstance(attn, dict) else attn
        if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
            _refuse("attn", attn, "it must be a dict, a list of dicts or None; write {'layers': [1], 'num_heads': 16}")
        specs = [ATTENTION_DEFAULTS | spec for spec in specs]
        for spec in specs:
            self._check_layer(spec)
            spec["num_kv_heads"] = spec["num_kv_heads"] or spec["num_heads"]
        layers = [layer for spec in specs for layer in spec["layers"]]
        if len(layers) > len(set(layers)):
            _refuse("attn layers", layers, "a layer is named twice; name each layer once")
        windows = sorted({spec["window_size"] for spec in specs if spec["window_size"] is not None})
        if len(windows) > 1:
            _refuse("attn window_size", windows, "all layers with a window must have the same one; give one size")
        return specs[0] if isinstance(attn, dict) else specs

    def _check_layer(self, spec: dict[str, Any]):
        """Check one description of attention layers.

        Raises:
            ValueError: a field is missing or cannot be as it is.
        """
        depth, d = self.num_hidden_layers, self.hidden_size
        for name in ("layers", "num_heads"):
            if name not in spec:
                _refuse("attn", spec, f"the field {name!r} is missing; add it")
        for name, value in spec.items():
            if name not in ("layers", "num_heads", *ATTENTION_DEFAULTS) and value:
                _refuse(f"attn {name}", value, "attention layers cannot have it here; remove it")
        if not set(spec["layers"]) <= set(range(depth)):
            _refuse("attn layers", spec["layers"], f"the model has {depth} layers; name layers from 0 to {depth - 1}")
        heads, groups = spec["num_heads"], spec["num_kv_heads"] or spec["num_heads"]
        if heads < 1 or d % heads or d // heads % 2:
            _refuse("attn num_heads", heads, f"hidden_size {d} / num_heads must be an even number; change one of them")
        if groups < 1 or heads % groups:
            _refuse("attn num_kv_heads", groups, f"it must divide num_heads {heads}; change one of the two")
        if spec["rope_theta"] is not None and not 0 < spec["rope_theta"] < float("inf"):
            _refuse("attn rope_theta", spec["rope_theta"], "it must be above 0 and finite, or None for no positions")
        if spec["window_size"] is not None and spec["window_size"] < 1:
            _refuse("attn window_size", spec["window_size"], "it must be at least 1, or None for no window")

    def attention_of(self, layer: int) -> dict[str, Any] | None:
        """Return the description of an attention layer, or None if the layer is an HGRN2 layer."""
        specs = [self.attn] if isinstance(self.attn, dict) else self.attn or []
        return next((spec for spec in specs if layer in spec["layers"]), None)

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, from which transformers builds the cache and the masks. It is not saved."""
        specs = map(self.attention_of, range(self.num_hidden_layers))
        return ["linear_attention" if spec is None else _kind_of_attention(spec) for spec in specs]

    @property
    def sliding_window(self) -> int | None:
        """The window of the attention layers that have one, in tokens, or None. It is not saved."""
        specs = [self.attn] if isinstance(self.attn, dict) else self.attn or []
        return next((spec["window_size"] for spec in specs if spec["window_size"] is not None), None)

    @property
    def mlp_width(self) -> int:
        """The width of the MLP."""
        return self.intermediate_size or 256 * -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256)


def _kind_of_attention(spec: dict[str, Any]) -> str:
    return "full_attention" if spec["window_size"] is None else "sliding_attention"


def _refuse(field: str, value: Any, reason: str):
    raise ValueError(f"HGRN2Config: {field} is {value!r}: {reason}")
