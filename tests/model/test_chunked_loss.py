"""--hgrn2-loss-chunk-size: the losses and gradients of Megatron's own path, and never more logits than a chunk's."""

import copy
import inspect

import harness
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hgrn2_megatron import UsageError, chunked_loss, model_hooks

pytestmark = pytest.mark.releases

TOKENS = harness.BATCH * harness.SEQ
STACK = {"hybrid_layer_pattern": "M-M-"}
MUP = {"use_mup": True, "mup_base_hidden_size": 16}
# In training, the gradients of the losses of its heads are added to those of the losses that it returns.
MTP = {"hybrid_layer_pattern": "M-M-/M-/M-", "mtp_loss_scaling_factor": 1.0}
both_forms = pytest.mark.parametrize("form", [{}, STACK], ids=["gpt", "stack"])


@pytest.fixture(autouse=True, scope="module")
def megatron():
    harness.start_megatron()


def build(size: int | None = None, dtype: torch.dtype = torch.float32, **settings):
    """A model of two layers, a GPT or a HybridModel, of the same weights whatever the size."""
    torch.manual_seed(0)
    model = harness.build_model(num_layers=2, hgrn2_loss_chunk_size=size, params_dtype=dtype, **settings)
    model.load_state_dict(harness.full_weights(model), strict=False)
    return model.to(dtype)


def losses_of(model) -> torch.Tensor:
    tokens, labels = harness.batch()
    # The heads of megatron-core 0.18 demand positions, though the model has no position embedding.
    positions = torch.arange(harness.SEQ).expand_as(tokens)
    return model(tokens, positions, None, labels=labels)


def results(model) -> dict[str, torch.Tensor]:
    """Losses, and every gradient of a sum of them in which each has another weight."""
    losses = losses_of(model)
    (losses * torch.linspace(0.1, 2, losses.numel()).view_as(losses)).sum().backward()
    return {"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters()}


# one token, no divisor of the 160, one chunk, more than there are
@pytest.mark.parametrize("size", [1, 7, 64, TOKENS, 1000])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", [{}, STACK, MTP], ids=["gpt", "stack", "mtp"])
def test_losses_and_every_gradient_are_those_of_megatrons_path(size, tied, form):
    ours = results(build(size, tied=tied, **form))
    assert ours["losses"].shape == (harness.BATCH, harness.SEQ) and ours["losses"].dtype == torch.float32
    harness.assert_all_close(ours, results(build(tied=tied, **form)), tolerance=2e-6)


@both_forms
def test_logits_are_scaled_as_mup_scales_them(form):
    model = build(7, **MUP, **form)
    assert model.config.mup_output_mult == 0.25
    harness.assert_all_close(results(model), results(build(**MUP, **form)), tolerance=2e-6)


def results_of_heads(model, **settings) -> dict[str, torch.Tensor]:
    """Return the values that Megatron logs for two MTP heads, and the gradients of hidden states and output weight.

    About half of the predictions are right.
    """
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper, process_mtp_loss

    config = copy.copy(model.config)
    for name, value in ({"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3} | settings).items():
        setattr(config, name, value)
    labels, weight = harness.batch()[1], model.output_layer.weight
    hidden = torch.cat([weight.detach()[labels.roll(-head, 1)].transpose(0, 1) for head in range(3)])
    hidden += torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    hidden.requires_grad_()
    given = dict(
        hidden_states=hidden,
        labels=labels,
        loss_mask=(labels % 5 > 0).float(),
        output_layer=model.output_layer,
        output_weight=None,
        runtime_gather_output=chunked_loss.BY_CHUNKS if config.hgrn2_loss_chunk_size else None,
        is_training=True,
        compute_language_model_loss=model.compute_language_model_loss,
        config=config,
        scale_logits_fn=model._scale_logits if config.use_mup else None,
    )
    # from 0.19 on
    if "tp_group" in inspect.signature(process_mtp_loss).parameters:
        given["tp_group"] = model.tp_group
    MTPLossLoggingHelper.tracker.clear()
    process_mtp_loss(**given).sum().backward()
    logged = {name: x for name, x in MTPLossLoggingHelper.tracker.items() if isinstance(x, torch.Tensor)}
    return logged | {name: x.grad for name, x in {"hidden": hidden, "weight": weight}.items() if x.grad is not None}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [({}, {}), ({}, {"calculate_per_token_loss": True}), ({}, {"mtp_detach_heads": True}), (MUP, {})],
    ids=["mean", "per-token", "detached", "mup"],
)
def test_heads_of_multi_token_prediction_have_the_losses_gradients_and_counts_of_megatrons_path(settings, changes):
    ours, theirs = (results_of_heads(build(size, **STACK, **settings), **changes) for size in (7, None))
    harness.assert_all_close(ours, theirs, tolerance=2e-6)
    for name in set(ours) & {"correct_values", "total_values"}:
        assert torch.equal(ours[name], theirs[name]), name


def results_of_last_layer(model, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses of hidden states [s, b, h], and gradients of them and of the output weight."""
    hidden = hidden.to(model.config.params_dtype, copy=True).requires_grad_()
    by_chunks = chunked_loss.BY_CHUNKS if model.config.hgrn2_loss_chunk_size else None
    logits, _ = model.output_layer(hidden, runtime_gather_output=by_chunks)
    losses = model.compute_language_model_loss(harness.batch()[1], logits)
    losses.sum().backward()
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": model.output_layer.weight.grad}


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_it_is_about_as_exact_as_megatrons_path(dtype, size):
    hidden = torch.randn(harness.SEQ, harness.BATCH, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = build()
    with torch.no_grad():
        exact.output_layer.weight.copy_(exact.output_layer.weight.to(dtype))
    ours, theirs, exact = (results_of_last_layer(m, hidden) for m in (build(size, dtype), build(None, dtype), exact))
    assert (ours["hidden"].dtype, ours["weight"].dtype) == (dtype, dtype)
    for name in "losses", "hidden":
        assert harness.relative_error(ours[name], theirs[name]) < 1e-4, name
    # the product of a chunk is rounded before it is added in fp32
    error, own = (harness.relative_error(x["weight"], exact["weight"]) for x in (ours, theirs))
    assert error <= 1.25 * own, (error, own)


class LogitRows(TorchDispatchMode):
    """Keeps the largest number of rows of any tensor that is as wide as the vocabulary, weights aside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == harness.VOCAB:
                self.largest = max(self.largest, x.numel() // harness.VOCAB)
        return result


@pytest.mark.parametrize(("size", "rows"), [(70, 70), (150, 150), (None, TOKENS)])
@pytest.mark.parametrize("compute", [results, results_of_heads])
@both_forms
def test_no_more_logits_than_a_chunks_exist(size, rows, compute, form, monkeypatch):
    # the width of nothing else
    monkeypatch.setattr(harness, "VOCAB", 11)
    model = build(size, **form)
    with LogitRows() as seen:
        compute(model)
    # above the 64 rows of the transposed weight
    assert seen.largest == rows


def test_a_weight_gets_one_gradient_however_many_chunks():
    model, calls = build(7), []
    model.output_layer.weight.register_post_accumulate_grad_hook(calls.append)
    results(model)
    assert len(calls) == 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fused_accumulation_adds_the_gradient_to_main_grad(tied):
    weight_name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    model = build(7, tied=tied)
    # the flag itself asks for an extension of apex
    model.output_layer.gradient_accumulation_fusion = True
    weight = dict(model.named_parameters())[weight_name]
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    ours = results(model)
    assert weight.grad_added_to_main_grad
    # what Megatron's hook adds of a tied weight: the embedding's part alone
    ours[weight_name] = weight.main_grad - 1 + weight.grad
    harness.assert_all_close(ours, results(build(tied=tied)), tolerance=1e-5)
    if not tied:
        assert not weight.grad.any()


def test_a_frozen_weight_gets_no_gradient_and_the_others_the_same():
    def frozen(size):
        model = build(size)
        model.output_layer.weight.requires_grad_(False)
        return {name: x for name, x in results(model).items() if name != "output_layer.weight"}

    harness.assert_all_close(frozen(7), frozen(None), tolerance=2e-6)


@both_forms
def test_logits_and_evaluation_are_megatrons(form):
    tokens, _ = harness.batch()
    ours, theirs = build(7, **form), build(**form)
    with torch.no_grad():
        assert torch.equal(ours(tokens, None, None), theirs(tokens, None, None))
        assert harness.relative_error(losses_of(ours), losses_of(theirs)) < 1e-6


def test_an_output_processor_of_the_caller_is_left_alone():
    def logits(*, hidden_states, output_layer, runtime_gather_output, **unused):
        return output_layer(hidden_states, runtime_gather_output=runtime_gather_output)[0]

    tokens, labels = harness.batch()
    given = build(7)(tokens, None, None, labels=labels, output_processor=logits)
    assert given.shape == (harness.SEQ, harness.BATCH, harness.VOCAB)


@both_forms
def test_only_models_that_ask_for_it_have_it(form):
    assert type(build(**form).output_layer) is not chunked_loss.LossLayer
    assert type(build(7, **form).output_layer) is chunked_loss.LossLayer
    # of a pipeline's other stages
    harness.build_model(hgrn2_loss_chunk_size=7, post_process=False, **form)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hgrn2_loss_chunk_size": 0}, "is 0, but a chunk has at least 1 token"),
        ({"hgrn2_loss_chunk_size": 7, "cross_entropy_loss_fusion": True}, "--cross-entropy-loss-fusion: drop one"),
        ({"hgrn2_loss_chunk_size": 7, "mtp_num_layers": 1}, "--mtp-num-layers in a GPT cannot be used"),
    ],
)
def test_what_it_does_not_go_with_is_refused_where_the_model_is_built(settings, message):
    with pytest.raises(UsageError, match=message):
        harness.build_model(**settings)


def test_another_output_layer_is_refused():
    layer = build().output_layer
    layer.output_dtype = torch.float32
    with pytest.raises(UsageError, match="--hgrn2-loss-chunk-size needs Megatron's plain output layer"):
        chunked_loss.LossLayer.take_over(layer)


def test_a_megatron_without_the_seam_is_refused(monkeypatch):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    def forward(self, input_ids, position_ids, attention_mask, decoder_input, labels):
        pass

    monkeypatch.setattr(HybridModel, "forward", forward)
    with pytest.raises(RuntimeError, match="release: .*forward has no parameter runtime_gather_output"):
        model_hooks.install_hybrid_model(None)


@pytest.mark.parametrize("size", [7, None])
def test_the_schedule_of_overlapped_exchanges_computes_it_too(size, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", torch.cpu.Event)
    tokens, labels = harness.batch()
    plan = build(size).build_schedule_plan(tokens, None, None, labels=labels)
    assert plan.state.runtime_gather_output is (chunked_loss.BY_CHUNKS if size else None)
