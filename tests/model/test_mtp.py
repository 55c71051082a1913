"""Multi-token prediction in a HybridModel: losses and every gradient equal those of an independent implementation."""

import contextlib
import re

import harness
import plain_hgrn2
import pytest
import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from plain_hgrn2 import rms_norm, under
from torch import Tensor

from hgrn2_megatron.config import UsageError
from hgrn2_megatron.forms import gpt_name

LAYERS, HEAD_DIM, ATTENTION_HEADS, SCALE = 3, 16, 4, 0.3
EXPERTS = {"num_moe_experts": 2, "moe_token_dispatcher_type": "allgather", "moe_aux_loss_coeff": 1e-2}
EXPERTS["moe_z_loss_coeff"] = 1e-3
HAS_DETACHED_HEADS = hasattr(TransformerConfig, "mtp_detach_heads")
detached = pytest.mark.skipif(not HAS_DETACHED_HEADS, reason="this release has no --mtp-detach-heads")


def build(pattern: str, **config):
    """A model with the weights of `harness.full_weights`."""
    harness.start_megatron()
    # of an earlier model, with other numbers of heads and layers
    MTPLossLoggingHelper.tracker.clear()
    get_moe_metrics_tracker()._metrics.clear()
    model = harness.build_model(hybrid_layer_pattern=pattern, mtp_loss_scaling_factor=SCALE, **config)
    model.load_state_dict(harness.full_weights(model), strict=False)
    return model


def run(model, **given) -> Tensor:
    """Losses [batch, time], or logits without labels."""
    tokens, labels = harness.batch()
    positions = torch.arange(harness.SEQ).expand_as(tokens)
    # given, because Megatron would draw its own on a CUDA device
    causal = torch.ones(1, 1, harness.SEQ, harness.SEQ, dtype=torch.bool).triu(1)
    return model(tokens, positions, causal, **{"labels": labels} | given)


def loss_mask() -> Tensor:
    return (torch.rand(harness.BATCH, harness.SEQ, generator=torch.Generator().manual_seed(3)) < 0.8).float()


def plain_weights(ours: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under the names that the plain model reads."""
    main = {gpt_name(name): x for name, x in ours.items() if not name.startswith("mtp.")}
    theirs = plain_hgrn2.from_megatron(main, LAYERS, HEAD_DIM)
    for head in range(num_heads):
        own = under(f"mtp.layers.{head}.", ours)
        layer = {re.sub(r"mtp_model_layer\.layers\.[01]\.", "", name): x for name, x in own.items()}
        theirs |= {f"{head}.{name}": x for name, x in plain_hgrn2.layer_from_megatron(layer, HEAD_DIM).items()}
        theirs |= {f"{head}.{name}": own[name] for name in own if "mtp_model_layer" not in name}
    return theirs


def attention_block(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    y = rms_norm(x, w["attn_norm.weight"], 1e-6) @ w["self_attention.linear_qkv.weight"].T
    q, k, v = y.unflatten(-1, (ATTENTION_HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
    frequencies = 10000 ** -(torch.arange(0, q.shape[-1], 2, dtype=x.dtype) / q.shape[-1])
    angles = (torch.arange(x.shape[1])[:, None] * frequencies).repeat(1, 2)

    def turn(y):
        a, b = y.chunk(2, -1)
        return y * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    o = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True).transpose(1, 2).flatten(2)
    return plain_hgrn2.channel_mixer(x + o @ w["self_attention.linear_proj.weight"].T, w)


def plain_losses(w: dict[str, Tensor], mask: Tensor, heads: list[int], detach: bool):
    """Losses [batch, time] of the next token, and the sum of the heads' losses. `heads` has a head for each depth."""

    def keep(x):
        return x.detach() if detach else x

    def next_ones(x):
        return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)

    def losses(hidden, output, labels):
        return F.cross_entropy((hidden @ output.T).transpose(1, 2), labels, reduction="none")

    tokens, labels = harness.batch()
    hidden = plain_hgrn2.hidden(w, tokens, LAYERS, HEAD_DIM)
    output, bound = w["lm_head.weight"], plain_hgrn2.lower_bounds(w["model.lower_bounds"])[-1]
    main, total, hidden = losses(hidden, output, labels), 0, keep(hidden)
    for head in heads:
        tokens, labels, mask = next_ones(tokens), next_ones(labels), next_ones(mask)
        own = under(f"{head}.", w)
        embedded = rms_norm(keep(w["model.embeddings.weight"])[tokens], own["enorm.weight"], 1e-6)
        joined = torch.cat([embedded, rms_norm(hidden, own["hnorm.weight"], 1e-6)], -1) @ own["eh_proj.weight"].T
        if "attn.q_proj.weight" in own:
            hidden = plain_hgrn2.block(joined, own, keep(bound), HEAD_DIM)
        else:
            hidden = attention_block(joined, own)
        hidden = rms_norm(hidden, own["final_layernorm.weight"], 1e-6)
        total = total + (losses(hidden, keep(output), labels) * mask).sum() / mask.sum()
    return main, SCALE * total / len(heads)


@pytest.mark.releases
@pytest.mark.parametrize(
    ("head", "config", "heads"),
    [
        ("M-", {}, [0]),
        ("M-", {}, [0, 1]),
        ("*-", {}, [0, 1]),
        ("M-", {"mtp_use_repeated_layer": True}, [0, 0]),
        pytest.param("M-", {"mtp_detach_heads": True}, [0, 1], marks=detached),
    ],
)
def test_losses_and_every_gradient(head, config, heads):
    model, mask = build("M-M-M-" + f"/{head}" * len(heads), **config), loss_mask()
    own = len(set(heads))
    losses = run(model, loss_mask=mask)
    losses.mean().backward()
    ours = plain_weights({name: p.grad for name, p in model.named_parameters()}, own)

    weights = plain_weights({name: p.detach().double() for name, p in model.named_parameters()}, own)
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    main, of_heads = plain_losses(weights, mask, heads, "mtp_detach_heads" in config)
    (main.mean() + of_heads).backward()
    theirs = {name: w.grad for name, w in weights.items()}
    harness.assert_all_close(ours | {"losses": losses}, theirs | {"losses": main}, tolerance=1e-5)


def without_heads(model, pattern: str):
    """The same model without its heads."""
    main = harness.build_model(hybrid_layer_pattern=pattern)
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("mtp.")}
    main.load_state_dict(weights, strict=True)
    return main


def greedy(model, prompts: Tensor, steps: int, engine: bool = True) -> Tensor:
    """Tokens as an engine of Megatron asks for them, or as an older program does."""
    name = "inference_context" if engine else "inference_params"
    context, tokens = StaticInferenceContext(len(prompts), harness.SEQ), prompts
    start = 0
    for _ in range(steps):
        s = tokens.shape[1] - start
        mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None] if s > 1 else None
        positions = torch.arange(start, start + s).expand(len(prompts), s)
        with InferenceMode.active() if engine else contextlib.nullcontext():
            logits = model(tokens[:, start:], positions, mask, **{name: context}, runtime_gather_output=True)
        start = context.sequence_len_offset = tokens.shape[1]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@torch.no_grad()
def test_a_model_computes_and_generates_the_same_without_its_heads():
    model = build("M-*-M-/M-/M-").eval()
    main = without_heads(model, "M-*-M-").eval()
    assert torch.equal(run(model), run(main)) and torch.equal(run(model, labels=None), run(main, labels=None))
    prompts = harness.batch()[0][:, :7]
    tokens = greedy(model, prompts, 12)
    assert torch.equal(tokens, greedy(main, prompts, 12)) and tokens[:, 7:].unique().numel() > 4
    assert torch.equal(tokens, greedy(model, prompts, 12, engine=False))


@pytest.mark.releases
@pytest.mark.parametrize(("pattern", "with_experts"), [("ME*E/*E/*E", [1, 3, 4, 5]), ("M-E/ME", [2, 3])])
def test_the_experts_of_each_head_have_a_place_for_their_losses(pattern, with_experts):
    model = build(pattern, **EXPERTS)
    run(model).mean().backward()
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if "router" in name)
    metrics = get_moe_metrics_tracker()._metrics
    assert sorted(metrics) == ["load_balancing_loss", "z_loss"]
    main, *heads = pattern.split("/")
    for metric in metrics.values():
        assert (
            len(metric.values) == len(main) + len(heads) and metric.values.nonzero().flatten().tolist() == with_experts
        )


@pytest.mark.parametrize("bounds", ["learned", "none"])
def test_documents_of_a_packed_row_are_predicted_as_rows_are(bounds):
    model = build("M-M-/M-/M-", hgrn2_lower_bounds=bounds)
    tokens, labels = harness.batch(size=2)
    found = []
    for shape, params in ((tokens.shape, None), ((1, -1), harness.packed_seq_params([harness.SEQ] * 2))):
        positions = torch.arange(harness.SEQ).repeat(2).view(shape)
        losses = model(tokens.view(shape), positions, None, labels=labels.view(shape), packed_seq_params=params)
        losses.mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"losses": losses.view(2, -1)})
        model.zero_grad()
    harness.assert_all_close(*found, tolerance=1e-5)


@pytest.mark.parametrize(
    ("pattern", "config", "message"),
    [
        ("M-/M-", {"mtp_num_layers": None}, "mtp_num_layers of the config is None, but .* 1 heads"),
        ("M-/M-", {"mtp_num_layers": 2}, "--mtp-num-layers is 2, but --hybrid-layer-pattern 'M-/M-' has 1 heads"),
        ("M-/D-", {}, "cannot have, 'D':"),
        ("M-/", {}, "a / without a head"),
        ("*-/M-", {}, "has no M before the first /"),
        ("M-/ME", {}, "--num-experts"),
        ("M-/*-", {"context_parallel_size": 2}, "--context-parallel-size is 2, but Megatron's own attention"),
    ],
)
def test_what_a_model_with_heads_cannot_have_is_refused(pattern, config, message):
    with pytest.raises(UsageError, match=message):
        build(pattern, **config)


def test_a_program_of_its_own_gives_the_pattern_to_the_model_alone(capsys):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from hgrn2_megatron.spec import hgrn2_stack

    config = build("M-*-/M-").config
    del config.hybrid_layer_pattern
    HybridModel(config, hgrn2_stack, harness.VOCAB, harness.SEQ, "M-*-/M-", position_embedding_type="rope")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HGRN2:")]
    assert lines[0] == lines[1] and "1 of 2 layers, 1 MTP head (M-), expand 16" in lines[0]
