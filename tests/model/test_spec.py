"""The static spec, as Megatron reads it where no launcher ran: defaults, and refusals when the model is built."""

import types

import harness
import pytest


def build(**config):
    harness.start_megatron()
    return harness.build_model(**config)


@pytest.fixture
def plain_config(monkeypatch):
    """Megatron's own TransformerConfig, which has no hgrn2 fields."""
    from megatron.core.transformer import TransformerConfig

    from hgrn2_megatron import arguments

    def without_hgrn2_fields(**settings):
        return TransformerConfig(**{k: v for k, v in settings.items() if not k.startswith("hgrn2_")})

    monkeypatch.setattr(arguments, "HGRN2TransformerConfig", without_hgrn2_fields)


def test_defaults_where_the_config_has_no_hgrn2_fields(plain_config, capsys):
    build(hidden_size=256)
    assert "HGRN2: 3 of 3 layers, expand 128, lower bounds learned" in capsys.readouterr().out


def test_pattern_is_read_by_the_layers_number():
    from hgrn2_megatron.mixer import HGRN2Mixer

    model = build(hgrn2_layer_pattern="*H", num_layers=4)
    kinds = [isinstance(layer.self_attention, HGRN2Mixer) for layer in model.decoder.layers]
    assert kinds == [False, True, False, True]


def test_no_bounds_no_parameter():
    names = [name for name, _ in build(hgrn2_lower_bounds="none").named_parameters()]
    assert not any("bounds" in name for name in names)


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        ({"normalization": "LayerNorm"}, "--normalization"),
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"gated_linear_unit": False}, "--swiglu"),
        ({"transformer_impl": "transformer_engine"}, "--transformer-impl"),
        ({"hgrn2_expand_ratio": 48}, "--hidden-size"),
    ],
)
def test_the_model_is_refused_when_it_is_built(config, flag):
    with pytest.raises(ValueError, match=flag):
        build(**config)


def test_megatrons_command_line_counts_when_the_model_is_built(monkeypatch):
    import megatron.training.global_vars as global_vars

    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", types.SimpleNamespace(reset_attention_mask=True))
    with pytest.raises(ValueError, match="--reset-attention-mask"):
        build()
