"""Training of the model for transformers: gradients, Trainer, gradient checkpointing, torch.compile, LoRA, dtypes."""

import copy
import importlib
import re

import harness
import peft
import pytest
import torch
from hf_models import MODELS, PAD, TIME, VOCAB, assert_close, build, tokens
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hgrn2_kernels import hf
from hgrn2_megatron.conversion.check import hf_logits
from hgrn2_megatron.conversion.config import megatron_args

KINDS = ["pure", "hybrid", "window"]


def gradients(model, ids: torch.Tensor, **arguments) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    loss = model(ids, labels=ids, **arguments).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_loss_and_gradients_are_those_of_the_recurrence(kind):
    model, ids = build(kind), tokens(2, TIME)
    ours = gradients(model, ids)
    args = megatron_args(model.config.to_dict())
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = hf_logits(args, weights.__getitem__, ids)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    harness.assert_all_close(ours, {"loss": loss.detach()} | {n: p.grad for n, p in weights.items()}, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_checkpointing_and_padding(kind):
    model, ids = build(kind), tokens(2, TIME)
    expected = gradients(model, ids)
    assert model(ids).cache is None
    model.gradient_checkpointing_enable()
    assert all(torch.equal(x, expected[name]) for name, x in gradients(model, ids).items())
    model.gradient_checkpointing_disable()

    # labels of -100 and padding on either side leave the loss of the tokens between
    alone = gradients(model, ids[:1, :13])
    for mine in (slice(TIME - 13, TIME), slice(0, 13)):
        mask = torch.zeros(1, TIME, dtype=torch.long)
        mask[:, mine] = 1
        padded = torch.full((1, TIME), PAD)
        padded[:, mine] = ids[:1, :13]
        labels = padded.masked_fill(mask == 0, -100)
        # padding does not predict the first token
        labels[:, mine.start] = -100
        model.train().zero_grad()
        model(padded, attention_mask=mask, labels=labels).loss.backward()
        for name, p in model.named_parameters():
            assert_close(p.grad, alone[name], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_after_a_cache_has_the_gradient_for_constant_states(kind):
    model, ids = build(kind).double(), tokens(2, TIME)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).cache

    def loss():
        # the loss of transformers is fp32, which is too coarse for the difference of two losses
        logits = model(ids[:, 8:], cache=copy.deepcopy(cache)).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 9:].flatten())

    loss().backward()
    torch.manual_seed(1)
    with torch.no_grad():
        direction = [1e-4 * torch.randn_like(p) for p in model.parameters()]
        along = sum((d * p.grad).sum() for d, p in zip(direction, model.parameters(), strict=True))
        values = []
        for sign in (1, -2):
            torch._foreach_add_(list(model.parameters()), direction, alpha=sign)
            values.append(loss())
    # rotary positions are fp32
    assert_close((values[0] - values[1]) / 2, along, 1e-3)


def test_a_cache_is_refused_with_gradient_checkpointing():
    model, ids = build("pure").train(), tokens(2, TIME)
    cache = model(ids[:, :4], use_cache=True).cache
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(ids[:, 4:], cache=cache)
    # without gradients nothing is computed twice
    with torch.no_grad():
        assert_close(model(ids[:, 4:], cache=cache).logits, model(ids).logits[:, 4:])
    assert model(ids, use_cache=True).cache is None


@pytest.mark.parametrize("kind", ["hybrid"])
def test_compiled_it_is_one_graph_with_the_same_results(kind):
    model, ids = build(kind), tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    ours = gradients(model, ids)
    torch._dynamo.reset()
    # inductor would take a minute without a GPU
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    harness.assert_all_close(
        {name.removeprefix("_orig_mod."): x for name, x in gradients(compiled, ids).items()}, ours, 1e-5
    )
    compiled.eval()
    assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected)


def train(model, folder, **settings) -> tuple[list[float], Trainer]:
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, TIME)]
    settings = (
        dict(max_steps=8, logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True) | settings
    )
    args = TrainingArguments(folder, per_device_train_batch_size=4, save_strategy="no", seed=0, **settings)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_trainer_lowers_the_loss_and_saves(kind, tmp_path):
    model = build(kind)
    losses, trainer = train(copy.deepcopy(model), tmp_path / "run")
    assert losses[-1] < losses[0] / 2
    assert trainer.evaluate()["eval_loss"] < losses[0] / 2
    checkpointed, _ = train(copy.deepcopy(model), tmp_path / "again", gradient_checkpointing=True)
    assert checkpointed == losses
    autocast, _ = train(copy.deepcopy(model), tmp_path / "bf16", bf16=True)
    assert autocast == pytest.approx(losses, rel=0.1) and autocast != losses
    trainer.save_model(str(tmp_path / "saved"))
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    again = hf.HGRN2ForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in stored.items())
    assert torch.equal(again(tokens(2, TIME)).logits, trainer.model.eval()(tokens(2, TIME)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_close_to_fp32(kind):
    model, ids = build(kind), tokens(2, TIME)
    expected = model(ids).logits
    half = copy.deepcopy(model).bfloat16()
    logits = half(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()
    assert half.generate(ids, max_new_tokens=3, pad_token_id=PAD).shape == (2, TIME + 3)


@pytest.mark.parametrize("kind", ["pure", "tied"])
def test_the_vocabulary_can_grow(kind):
    model, ids = build(kind), tokens(2, TIME)
    expected = model(ids).logits
    model.resize_token_embeddings(VOCAB + 6)
    logits = model(ids).logits
    assert logits.shape[-1] == model.config.vocab_size == VOCAB + 6
    assert torch.equal(logits[..., :VOCAB], expected)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == bool(MODELS[kind].get("tie_word_embeddings"))


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_lora_trains_the_projections(kind, tmp_path):
    names = ["q_proj", "f_proj", "i_proj", "o_proj", "down_proj"]
    model = build(kind)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=names, r=4, task_type="CAUSAL_LM")
    )
    ids = tokens(4, TIME)
    assert torch.equal(adapted(input_ids=ids).logits, model(ids).logits)
    losses, trainer = train(adapted, tmp_path / "run")
    assert losses[-1] < losses[0] - 0.5
    base = trainer.model.get_base_model().state_dict()
    kept = {name.replace(".base_layer", ""): x for name, x in base.items() if "lora" not in name}
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    trained = trainer.model.eval()(input_ids=ids).logits
    assert_close(trainer.model.merge_and_unload()(ids).logits, trained)


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(harness.ROOT / "examples")
    importlib.import_module("byte_tokenizer").write(tmp_path / "exported")
    build("hybrid", vocab_size=257, eos_token_id=256).save_pretrained(tmp_path / "exported")
    hf.register(exist_ok=True)
    page = (harness.ROOT / "docs" / "guides" / "hugging-face.md").read_text()
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, names)
    assert names["tokens"].shape == (2, 27) and names["tokens"][0, 1:7].tolist() == list(b"def f(")
    assert (tmp_path / "trained" / "last" / "model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    """The kernels give the logits, gradients and tokens of the CPU."""
    model, ids = build(kind, num_heads=None, expand_ratio=32), tokens(2, TIME)
    ours, expected = gradients(model, ids), model.eval()(ids).logits
    prompt = dict(attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False, pad_token_id=PAD)
    continued = model.generate(ids, **prompt)
    model.cuda()
    assert_close(model(ids.cuda()).logits.cpu(), expected, 1e-4)
    on_gpu = {name: x.cpu() for name, x in gradients(model, ids.cuda()).items()}
    harness.assert_all_close(on_gpu, ours, 1e-4)
    prompt["attention_mask"] = prompt["attention_mask"].cuda()
    assert torch.equal(model.eval().generate(ids.cuda(), **prompt).cpu(), continued)
    half = model.bfloat16()
    assert (half(ids.cuda()).logits.float().cpu() - expected).norm() < 0.03 * expected.norm()
    losses = [gradients(half, ids.cuda())["loss"].item(), ours["loss"].item()]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    compiled = torch.compile(half)
    got = gradients(compiled, ids.cuda())["loss"].item()
    assert got == pytest.approx(losses[0], rel=0.01)
