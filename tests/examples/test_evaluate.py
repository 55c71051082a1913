"""Evaluation: the tokenizer of bytes, the tasks, and lm-evaluation-harness's sums against a plain model's."""

import importlib
import json
import sys

import harness
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import HGRN2, STACK, train
from transformers import AutoTokenizer

from hgrn2_megatron.conversion import check as hf_check
from hgrn2_megatron.conversion import command as convert
from hgrn2_megatron.conversion.config import megatron_args

TEXTS = ["def f(x):\n\treturn x + 1  \n" * 30, "Wörter, 日本語 und \U0001f600 <0x41> \x00\r\n" * 40]


@pytest.fixture
def example(monkeypatch):
    """Import a script of examples/ by name, with those that it imports."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(harness.ROOT / "examples")
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if str(harness.ROOT / "examples") in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_tokens_of_the_tokenizer_are_bytes(example, tmp_path):
    example("byte_tokenizer").write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["", *TEXTS]:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.bos_token_id] == [tokenizer.eos_token_id] == [256]
    assert len(tokenizer) == 257
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 256


def write_tasks(example, folder):
    """Both tasks of TEXTS, 6 items and 2 passages; their lines by name."""
    example("prepare_bytes").write([text.encode() for text in TEXTS], folder / "heldout")
    example("evaluation_task").write(folder / "heldout", folder / "tasks", 6, 2)
    files = (folder / "tasks").glob("*.jsonl")
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_the_right_choice_continues_its_text(example, tmp_path):
    lines = write_tasks(example, tmp_path)
    assert len(lines["heldout_continuation"]) == 6 and len(lines["heldout_bits"]) == 2
    for item in lines["heldout_continuation"]:
        assert any(item["context"] + item["choices"][item["answer"]] in text for text in TEXTS)
        assert len(item["choices"]) == 4
    assert all(any(line["text"] in text for text in TEXTS) for line in lines["heldout_bits"])
    (tmp_path / "again").mkdir()
    assert write_tasks(example, tmp_path / "again") == lines


def test_a_dataset_of_short_documents_is_refused(example, tmp_path):
    example("prepare_bytes").write([b"short"], tmp_path / "short")
    with pytest.raises(ValueError, match="no document of 600 characters"):
        example("evaluation_task").write(tmp_path / "short", tmp_path / "tasks", 6, 2)


def test_logits_without_padding_of_the_vocabulary(example):
    harness.start_megatron()
    whole = harness.build_model(hybrid_layer_pattern="M-M-")
    tokens = torch.randint(40, (2, harness.SEQ), generator=torch.Generator().manual_seed(0))
    model = example("evaluate").Model(whole, 40, harness.SEQ).eval()
    logits = model(tokens).logits
    assert logits.shape == (2, harness.SEQ, 40)
    expected = whole(tokens, torch.arange(harness.SEQ).expand_as(tokens), None)[..., :40]
    assert torch.equal(logits, expected)
    # tokens that are padded on the right, as the harness does it, are the same tokens
    torch.testing.assert_close(model(tokens[:, :17]).logits, logits[:, :17])


def log_likelihoods(hf, tokens: list[int], windows: list[tuple[int, int, int]]) -> float:
    """Sum of the plain model's log-probabilities.

    Args:
        hf: folder of the exported model.
        tokens: of the text.
        windows: (start, first, end): tokens first..end after start..
    """
    args = megatron_args(json.loads((hf / "config.json").read_text()))
    weights = load_file(hf / "model.safetensors")
    total = 0.0
    for start, first, end in windows:
        logits = hf_check.hf_logits(args, weights.__getitem__, torch.tensor([tokens[start : end - 1]]))[0]
        scores = logits.log_softmax(-1)[range(end - 1 - start), tokens[start + 1 : end]]
        total += scores[first - start - 1 :].sum().item()
    return total


def samples_of(folder) -> dict[str, list]:
    """Return the responses of each task that the harness has logged, in the order of the task."""
    samples = {}
    for file in folder.rglob("samples_*.jsonl"):
        kept = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        samples[file.stem.rsplit("_", 1)[0].removeprefix("samples_")] = [sample["filtered_resps"] for sample in kept]
    return samples


@pytest.mark.parametrize(
    ("processes", "script", "model"),
    [
        (1, "pretrain_gpt.py", (*HGRN2, "--hgrn2-layer-pattern", "H*")),
        (2, "pretrain_hybrid.py", (*STACK, "--hybrid-layer-pattern", "M-*-")),
    ],
)
def test_the_scores_are_those_of_the_exported_model(processes, script, model, example, tmp_path):
    """Train with tensor parallelism or without, evaluate the checkpoint, and compare with what was exported from it.

    Plain sums, Megatron's model and the model for transformers must give the same scores.
    """
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lm-eval[hf]'")
    # far from uniform probabilities
    saving = ("--init-method-std", 0.2, "--train-iters", 4, "--save", tmp_path / "saved", "--save-interval", 4)
    layout = ("--tensor-model-parallel-size", processes)
    train(*model, "--vocab-size", 257, *layout, *saving, script=f"examples/{script}", num_processes=processes)
    example("byte_tokenizer").write(tmp_path / "saved" / "tokenizer")
    lines = write_tasks(example, tmp_path)
    convert.main([str(tmp_path / "saved"), str(tmp_path / "hf"), "--no-check"])

    load = ("--load", tmp_path / "saved", "--use-checkpoint-args", *layout)
    tasks = ("--tasks", *lines, "--include_path", tmp_path / "tasks")
    out = ("--batch_size", 4, "--log_samples", "--output_path", tmp_path / "out")
    run = map(str, ("-m", "hgrn2_megatron", "examples/evaluate.py", *load, "--", *tasks, *out))
    done = harness.torchrun(processes, *run)
    assert done.returncode == 0, done.stdout[-3000:]

    samples = samples_of(tmp_path / "out")
    for item, actual in zip(lines["heldout_continuation"], samples["heldout_continuation"], strict=True):
        for choice, (score, _) in zip(item["choices"], actual, strict=True):
            first, tokens = len(item["context"].rstrip().encode()), list((item["context"] + choice).encode())
            window = (max(0, len(tokens) - 65), max(first, len(tokens) - 64), len(tokens))
            expected = log_likelihoods(tmp_path / "hf", tokens, [window])
            np.testing.assert_allclose(float(score), expected, rtol=1e-5)
    for item, actual in zip(lines["heldout_bits"], samples["heldout_bits"], strict=True):
        tokens = [256, *item["text"].encode()]
        windows = [(first - 1, first, min(first + 64, len(tokens))) for first in range(1, len(tokens), 64)]
        # the last window reaches back as far as it may
        windows[-1] = (max(0, len(tokens) - 65), *windows[-1][1:])
        np.testing.assert_allclose(float(actual[0]), log_likelihoods(tmp_path / "hf", tokens, windows), rtol=1e-5)

    # the exported folder, computed by the model for transformers
    out = ("--batch_size", 4, "--log_samples", "--output_path", tmp_path / "hf_out")
    folder = ("--model_args", f"pretrained={tmp_path / 'hf'},dtype=float32")
    done = harness.python("examples/evaluate_exported.py", *map(str, (*folder, *tasks, *out)))
    assert done.returncode == 0, done.stdout[-3000:]
    exported = samples_of(tmp_path / "hf_out")
    assert exported.keys() == samples.keys()
    for task, expected in samples.items():
        scores = [
            [float(answer[0] if isinstance(answer, list) else answer) for item in kept for answer in item]
            for kept in (exported[task], expected)
        ]
        np.testing.assert_allclose(*scores, rtol=1e-5)
