"""What Megatron logs as TFLOP/s: against the weights of the model that is built, and what attention alone is."""

import argparse

import harness
import pytest

SEQ, BATCH, HEADS = harness.SEQ, 3, 4


@pytest.fixture(scope="module")
def count():
    harness.start_megatron()
    import megatron.training.arguments as arguments
    import megatron.training.training as training

    from hgrn2_megatron import arguments as ours
    from hgrn2_megatron import megatron_hooks

    megatron_hooks.install_reports()

    def of(spec, packed=None, **settings):
        parser = ours.add_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
        args = parser.parse_args([])
        args.spec = ["hgrn2_megatron.spec", spec] if spec else None
        values = dict(
            num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=HEADS, kv_channels=16, swiglu=True,
            seq_length=SEQ, padded_vocab_size=harness.VOCAB, hgrn2_expand_ratio=16,
        )  # fmt: skip
        for name, value in (values | settings).items():
            setattr(args, name, value)
        return training.num_floating_point_operations(args, BATCH, *(packed or ()))

    return of


def of_weights(tokens, **config):
    """Six operations for each weight that multiplies, and each token."""
    model = harness.build_model(num_layers=4, **config)
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "word_embeddings" not in name]
    return 6 * tokens * sum(p.numel() for p in weights)


# of one layer and token: the state's update and the output from it; scores and values of half the tokens
STATE = 6 * 2 * 64 * 16
SCORES = 6 * 2 * 64 / 2


def test_a_pure_stack(count):
    tokens = BATCH * SEQ
    assert count("hgrn2") == of_weights(tokens) + 4 * tokens * STATE


def test_a_hybrid(count):
    tokens = BATCH * SEQ
    want = of_weights(tokens, hgrn2_layer_pattern="HHH*") + 3 * tokens * STATE + tokens * SEQ * SCORES
    assert count("hgrn2", hgrn2_layer_pattern="HHH*") == pytest.approx(want, rel=1e-12)


def test_a_hybrid_model_is_its_gpt_form(count):
    want = count("hgrn2", hgrn2_layer_pattern="HHH*")
    assert count("hgrn2_stack", hybrid_layer_pattern="M-M-M-|*-") == pytest.approx(want, rel=1e-12)


def test_tokens_of_packed_sequences_count_as_they_are(count):
    packed = 1000, 70
    want = of_weights(70, hgrn2_layer_pattern="HHH*") + 3 * 70 * STATE + 1000 * SCORES
    assert count("hgrn2", packed, hgrn2_layer_pattern="HHH*") == pytest.approx(want, rel=1e-12)


def test_attention_is_counted_as_before(count):
    tokens = BATCH * SEQ
    assert count(None) == of_weights(tokens, hgrn2_layer_pattern="H***") + 4 * tokens * SEQ * SCORES


@pytest.mark.parametrize("head", ["M-", "M", "*-"])
def test_each_head_counts_as_its_layers_and_an_output_layer(head, count):
    """Megatron counts no head's projection of the hidden state and the embedding, and ours is its count."""
    main, tokens, number = "M-M-M-*-", BATCH * SEQ, 2
    layers = of_weights(tokens, hybrid_layer_pattern=main + number * head) - of_weights(
        tokens, hybrid_layer_pattern=main
    )
    mixers = STATE if "M" in head else SEQ * SCORES
    want = count("hgrn2_stack", hybrid_layer_pattern=main) + layers
    want += number * tokens * (mixers + 6 * 64 * harness.VOCAB)
    pattern = main + number * f"/{head}"
    assert count("hgrn2_stack", hybrid_layer_pattern=pattern, mtp_num_layers=number) == pytest.approx(want, rel=1e-12)
