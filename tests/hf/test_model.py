"""The model for transformers: logits beside Megatron's and a plain model's, padding, packing, generation, folders."""

import json

import harness
import pytest
import torch
from hf_models import ATTENTION, PAD, SIZES, TIME, VOCAB, WINDOW, assert_close, build, randomize, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hgrn2_kernels import hf
from hgrn2_kernels.hf import versions
from hgrn2_megatron.conversion.check import hf_logits
from hgrn2_megatron.conversion.config import hf_config, megatron_args
from hgrn2_megatron.conversion.weights import weights


@pytest.mark.parametrize(("kind", "pattern"), [("pure", "M-M-M-"), ("hybrid", "M-*-M-"), ("no positions", "M-*-M-")])
def test_an_exported_folder_gives_megatrons_logits(kind, pattern, tmp_path):
    harness.start_megatron()
    changes = {} if kind == "pure" else {"num_query_groups": 2}
    if kind == "no positions":
        changes["position_embedding_type"] = "none"
    megatron = harness.build_model(hybrid_layer_pattern=pattern, **changes)
    randomize(megatron)
    theta = {"hybrid": 10000.0, "no positions": None}
    attn = ATTENTION | {"rope_theta": theta[kind]} if kind in theta else None
    args = megatron_args(SIZES | {"model_type": "hgrn2", "max_position_embeddings": harness.SEQ, "attn": attn})
    args.padded_vocab_size = VOCAB
    saved = {x.key: x.data for x in megatron.sharded_state_dict().values() if hasattr(x, "key")}
    exported = {}
    for weight in weights(args, VOCAB):
        exported |= dict(
            zip(weight.parts, weight.split(saved[weight.name].detach().reshape(weight.shape)), strict=True)
        )
    save_file(exported, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(args, VOCAB, "float32", {})))

    ids = tokens(2, harness.SEQ)
    causal = torch.ones(1, 1, harness.SEQ, harness.SEQ, dtype=torch.bool).triu(1)
    expected = megatron(ids, torch.arange(harness.SEQ).expand_as(ids), causal)
    model = hf.HGRN2ForCausalLM.from_pretrained(tmp_path)
    assert_close(model(ids).logits, expected)
    assert_close(model(ids, use_cache=False, logits_to_keep=3).logits, expected[:, -3:])


@pytest.mark.parametrize("kind", ["pure", "tied", "no bounds", "hybrid", "no positions"])
def test_a_saved_folder_is_in_flas_format_and_loads_bit_for_bit(kind, tmp_path):
    # Megatron imports fla where it is installed, and fla registers its own classes
    hf.register(exist_ok=True)
    model = build(kind)
    model.save_pretrained(tmp_path)
    config, stored = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    args = megatron_args(config)
    assert {n: s for w in weights(args, VOCAB) for n, s in w.parts.items()} == {n: x.shape for n, x in stored.items()}
    ids = tokens(2, TIME)
    assert_close(model(ids).logits, hf_logits(args, stored.__getitem__, ids))

    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is hf.HGRN2ForCausalLM and not any(found.values())
    assert again.config.to_dict() | {"dtype": None} == AutoConfig.from_pretrained(tmp_path).to_dict() | {"dtype": None}
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(half) is hf.HGRN2Model and half.dtype == half(ids).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["pure", "hybrid", "no positions", "window"])
def test_padding_and_packing_change_nothing(kind):
    model, ids, n = build(kind), tokens(2, TIME), 13
    whole = model(ids).logits
    for mine in (slice(TIME - n, None), slice(n)):
        mask = torch.ones_like(ids)
        mask[1] = 0
        mask[1, mine] = 1
        logits = model(ids.where(mask.bool(), PAD), attention_mask=mask).logits
        assert_close(logits[1:, mine], model(ids[1:, mine]).logits)
        assert_close(logits[0], whole[0])

    ends = [0, 6, 13, TIME]
    alone = [model(ids[:, a:b]).logits for a, b in zip(ends, ends[1:], strict=False)]
    alone = torch.cat(alone, 1)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(ends, ends[1:], strict=False)])[None]
    assert_close(model(ids, position_ids=positions).logits, alone)
    packed = torch.tensor([0, 6, 6, 13, TIME], dtype=torch.int32)
    assert_close(model(ids[:1], cu_seqlens=packed).logits, alone[:1])
    assert_close(model(ids, position_ids=torch.arange(TIME)[None]).logits, whole)


@pytest.mark.parametrize("kind", ["pure", "hybrid", "window"])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(kind):
    model = build(kind)
    prompts = [tokens(9)[:n] for n in (3, 9, 6)]
    batch, mask = torch.full((2, 3, 9), PAD)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    settings = dict(max_new_tokens=256, do_sample=False, pad_token_id=PAD)
    together = model.generate(batch, attention_mask=mask, **settings)[:, 9:]
    assert together.shape == (3, 256) and len(together.unique()) > 10
    for prompt, mine in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt[None], **settings)[0, len(prompt) :], mine)

    few = dict(attention_mask=mask, pad_token_id=PAD, max_new_tokens=12)
    for choice in (dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, top_k=5)):
        torch.manual_seed(0)
        kept = model.generate(batch, **few, **choice)
        torch.manual_seed(0)
        assert torch.equal(kept, model.generate(batch, **few, **choice, use_cache=False))
    static = model.generate(batch, **few, do_sample=False, cache_implementation="static")
    assert torch.equal(static[:, 9:], together[:, :12])


@pytest.mark.parametrize("kind", ["pure", "hybrid", "window"])
def test_a_prompt_of_embeddings_generates_what_its_tokens_do(kind):
    model, ids = build(kind), tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    embeddings = model.get_input_embeddings()(ids).detach()
    for choice in ({}, {"attention_mask": mask}, {"num_beams": 2}, {"cache_implementation": "static"}):
        expected = model.generate(ids, **settings, **choice)[:, TIME:]
        assert torch.equal(model.generate(inputs_embeds=embeddings, **settings, **choice), expected)
    cache = model(ids[:, :8], use_cache=True).cache
    found = model.generate(inputs_embeds=embeddings, cache=cache, **settings)
    assert torch.equal(found, model.generate(ids, **settings)[:, TIME:])


@pytest.mark.parametrize("kind", ["pure", "hybrid", "no positions", "window"])
def test_the_cache_goes_on_and_does_not_grow(kind):
    model, ids = build(kind), tokens(2, TIME)
    expected, first = model(ids).logits, model(ids[:, :8], use_cache=True)
    cache = first.cache
    parts = [first.logits, model(ids[:, 8:12], cache=cache).logits]
    with torch.no_grad():
        parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(12, TIME - 1)]
    # a step with gradients does not change the states that autograd keeps
    parts.append(model(ids[:, -1:], cache=cache).logits)
    assert_close(torch.cat(parts, 1), expected)
    layers = zip(cache.layers, model.config.layer_types, strict=True)
    sizes = [layer.recurrent_states[0].shape for layer, layer_type in layers if layer_type == "linear_attention"]
    assert sizes == [(2, 4, 16, 16)] * len(sizes)
    if kind == "window":
        assert cache.layers[0].keys.shape[-2] == 4

    def scores(prompt, **arguments):
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=PAD)
        kept = model.generate(prompt, **settings, **arguments, output_logits=True, return_dict_in_generate=True)
        return torch.stack(kept.logits)

    longer = torch.cat([ids, tokens(2, 4)], 1)
    assert_close(scores(longer, cache=cache), scores(longer))
    cache.reset()
    assert_close(scores(ids, cache=cache), scores(ids))


@pytest.mark.parametrize("kind", ["pure", "hybrid", "window"])
def test_padding_that_comes_as_a_single_token_changes_nothing(kind):
    model, ids = build(kind), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts = None, []
    with torch.no_grad():
        for t in range(9):
            given = dict(attention_mask=mask[:, : t + 1], position_ids=positions[:, t : t + 1])
            step = model(ids[:, t : t + 1], **given, cache=cache, use_cache=True)
            cache, parts = step.cache, [*parts, step.logits]
        logits = torch.cat(parts, 1)
        assert_close(logits[:1], model(ids[:1]).logits)
        assert_close(logits[1:, 4:], model(ids[1:, 4:]).logits)
    if kind != "pure":
        settings = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        assert torch.equal(model.generate(ids, **settings, prefill_chunk_size=1), model.generate(ids, **settings))
    # with a static cache, generate makes the masks
    embedded = torch.empty(2, 1, 0)
    masks = model.create_masks_for_generate(embedded, mask[:, :3], config=model.config, cache=None)
    assert masks["linear_attention"].tolist() == [[1], [0]]


def test_padding_on_the_right_leaves_the_state():
    model, ids = build("pure"), tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[:, 13:] = 0
    padded = model(ids, attention_mask=mask, use_cache=True).cache
    alone = model(ids[:, :13], use_cache=True).cache
    for layer, expected in zip(padded.layers, alone.layers, strict=True):
        assert_close(layer.recurrent_states[0], expected.recurrent_states[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"expand_ratio": 24}, "expand_ratio is 24"),
        ({"expand_ratio": None, "num_heads": 5}, "num_heads is 5"),
        ({"expand_ratio": None}, "num_heads is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_short_conv": True}, "use_short_conv is True"),
        ({"attnres_block_size": 2}, "attnres_block_size is 2"),
        ({"attn": "all"}, "attn is 'all'"),
        ({"attn": {"layers": [1]}}, "attn is .*'num_heads' is missing"),
        ({"attn": ATTENTION | {"layers": [3]}}, "attn layers is .3.: the model has 3 layers"),
        ({"attn": [ATTENTION, ATTENTION]}, "attn layers is .*named twice"),
        ({"attn": ATTENTION | {"num_heads": 5}}, "attn num_heads is 5"),
        ({"attn": ATTENTION | {"rope_theta": 0}}, "attn rope_theta is 0: .* None for no positions"),
        ({"attn": ATTENTION | {"num_kv_heads": 3}}, "attn num_kv_heads is 3"),
        ({"attn": ATTENTION | {"window_size": 0}}, "attn window_size is 0"),
        ({"attn": [WINDOW[0], ATTENTION | {"window_size": 7}]}, r"attn window_size is \[5, 7\]"),
        ({"attn": ATTENTION | {"qk_norm": True}}, "attn qk_norm is True"),
    ],
)
def test_a_wrong_config_is_refused_by_field(changes, named):
    with pytest.raises(ValueError, match=f"HGRN2Config: {named}"):
        hf.HGRN2Config(**SIZES | changes)


def test_wrong_arguments_are_refused():
    model, ids = build("pure"), tokens(2, TIME)
    packed = torch.tensor([0, 6, TIME], dtype=torch.int32)
    for message, arguments in {
        "either input_ids or inputs_embeds": {},
        "cu_seqlens needs a batch of one row": {"input_ids": ids, "cu_seqlens": packed},
        "packed sequences have no cache": {"input_ids": ids[:1], "cu_seqlens": packed, "use_cache": True},
        "cu_seq_lens_q and seq_idx alone": {"input_ids": ids[:1], "cu_seq_lens_q": packed, "seq_idx": packed},
        "attention_mask has 4 dimensions": {"input_ids": ids, "attention_mask": torch.ones(2, 1, TIME, TIME)},
    }.items():
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=2)
    with pytest.raises(ValueError, match="use_l2warp is true"):
        build("pure", use_l2warp=True)(ids, labels=ids)


def test_another_package_that_has_registered_is_not_replaced_silently():
    class Other(hf.HGRN2Config):
        pass

    AutoConfig.register("hgrn2", Other, exist_ok=True)
    try:
        with pytest.raises(ValueError, match=r"already build .*Other .*register\(exist_ok=True\)"):
            hf.register()
    finally:
        hf.register(exist_ok=True)
    hf.register()
    assert type(AutoModelForCausalLM.from_config(AutoConfig.for_model("hgrn2", **SIZES))) is hf.HGRN2ForCausalLM


def test_other_releases_of_transformers_are_refused():
    versions.check("5.24.0")
    versions.check("5.30.1.dev0")
    for version in ("4.57.1", "5.23.0", "6.0.0", None):
        with pytest.raises(ImportError, match=r"transformers>=5.24,<6"):
            versions.check(version)
