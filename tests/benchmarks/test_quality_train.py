"""Models trained alike on a small corpus, stopped and continued, and what is drawn of them."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import harness
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
SOURCES = sorted((FOLDER.parents[1] / "hgrn2_megatron").glob("*.py"))


def call(script: str, *command) -> str:
    done = harness.python(str(FOLDER / script), *map(str, command))
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """This package as a corpus, its shortest files held out."""
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.syspath_prepend(FOLDER)
        texts = sorted((path.read_bytes() for path in SOURCES), key=len)
        (folder / "heldout.txt").write_bytes(b"\0".join([*texts[1:9], b""]))
        (folder / "train.txt").write_bytes(b"\0".join([*texts[9:], b""]))
        call("tokens.py", folder, folder / "data", "--vocab", 512)
        yield folder / "data"


def test_tokens_give_the_text_back(data):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    tokenizer, counts = Tokenizer.from_file(str(data / "tokenizer.json")), json.loads((data / "data.json").read_text())
    # its documents are views of a file that is mapped while it lives
    dataset = IndexedDataset(str(data / "heldout"))
    documents = dataset[:]
    assert all(document[-1] == 511 and (document[:-1] < 511).all() for document in documents)
    texts = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert "\0".join([*texts, ""]).encode() == (data.parent / "heldout.txt").read_bytes()
    assert counts["heldout"] == {
        "documents": 8,
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(map(len, documents)),
    }


def test_a_sample_keeps_its_documents_when_the_corpus_changes(tmp_path):
    path, texts = tmp_path / "side.txt", [f"document {number}" for number in range(400)]
    sampled = []
    for documents in (texts, texts[:1] + texts[7:]):
        path.write_text("".join(text + "\0" for text in documents))
        sampled.append(list(harness.load("benchmarks/quality/tokens.py").sample(path, 4)))
    assert 70 < len(sampled[0]) < 130 and set(sampled[1]) == set(sampled[0]) - set(texts[1:7])
    assert list(harness.load("benchmarks/quality/tokens.py").sample(path, 1)) == texts[:1] + texts[7:]


def train(data, out, model, *more):
    common = ("--size", "tiny", "--data", data, "--out", out, "--lr", "5e-3", "--iterations", 16, "--every", 4)
    return call("train.py", model, *common, *more)


# attention is what the others are compared with, and each other model changes another flag
TRAINED = ("attention", "hgrn2", "hgrn2-no-bounds", "hgrn2-expand-16", "hybrid-1-1", "hybrid-no-positions")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with a run of each model, and a second seed of one."""
    folder = tmp_path_factory.mktemp("runs")
    for model in TRAINED:
        more = ("--no-checkpoints", "--lengths", 64, 128) if model == "hgrn2" else ()
        assert train(data, folder, model, "--evaluations", 2, *more).endswith("done\n")
    first, second = (folder / f"hybrid-1-1-0.005-seed{seed}" for seed in (1, 2))
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("checkpoints", "index"))
    (second / "run.json").write_text((first / "run.json").read_text().replace('"seed": 1', '"seed": 2'))
    log = (first / "piece.0.log").read_text()
    at = log.rindex("lm loss value: ") + len("lm loss value: ")
    (second / "piece.0.log").write_text(f"{log[:at]}{float(log[at : at + 12]) + 0.2:.6E}{log[at + 12 :]}")
    return folder


def test_models_train_alike_and_are_drawn(runs, tmp_path):
    figures, image = tmp_path / "figures.json", tmp_path / "figures.png"
    printed = call("draw.py", runs, "--json", figures, "--picture", image)
    drawn = json.loads(figures.read_text())
    found = {run["model"]: run for run in drawn["runs"] if run["seed"] == 1}
    assert tuple(found) == TRAINED and image.stat().st_size > 10_000
    # The bounds of 4 layers of 64 channels are the whole difference.
    parameters = {model: run["parameters"] for model, run in found.items()}
    assert parameters["hgrn2"] - parameters["hgrn2-no-bounds"] == 4 * 64
    assert parameters["hgrn2"] == parameters["hgrn2-expand-16"]
    assert max(parameters.values()) < 1.01 * min(parameters.values())
    for model, run in found.items():
        assert run["done"] and run["tokens"] == 16 * 8 * 64
        tokens, _, bits = run["heldout"][-1]
        # log2 of 512 tokens, of so many bytes each, is what a model that knows nothing needs
        counts = run["data"]["heldout-sample"]
        assert tokens == run["tokens"] and bits < 0.9 * 9 * counts["tokens"] / counts["bytes"]
        assert model == "hybrid-1-1" or f"**{bits:.4f}**" in printed
    # the gates were measured with the loss by position, in each of the 4 layers
    assert [len(run["gates"]) for run in found.values()] == [4 * (model == "hgrn2") for model in TRAINED]
    # the ranges of positions take all of a sequence together
    (longest,) = (run["lengths"][-1] for run in found.values() if run["lengths"])
    assert longest["loss"] != longest["long_documents"]["loss"]
    for lines, measured in ((drawn["positions"], longest), (drawn["long documents"], longest["long_documents"])):
        parts = [[int(word.replace(",", "")) for word in line["tokens before"].split(" to ")] for line in lines]
        assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == longest["length"]
        total = sum((end - start) * float(line["HGRN2"]) for (start, end), line in zip(parts, lines, strict=True))
        assert total / longest["length"] == pytest.approx(measured["loss"], abs=1e-3)
    # the first batch is the same, and no model knows anything of it
    first = [run["training"][0][1] for run in found.values()]
    assert max(first) - min(first) < 0.1
    # each model is another one
    assert len({run["heldout"][-1][2] for run in found.values()}) == len(TRAINED)


def test_seeds_share_a_line_with_their_mean_and_difference(runs, tmp_path):
    sys.path.append(str(FOLDER))
    import draw

    assert len(list(runs.iterdir())) == len(TRAINED) + 1
    found = draw.read_all(runs)
    lines = {line["model"]: line for line in draw.rows(found)}
    one, two = (run["heldout"][-1][2] for run in found if run["model"] == "hybrid-1-1")
    assert two > one and len(lines) == len(TRAINED)
    seeds, mean = lines["hybrid-1-1"], f"**{(one + two) / 2:.4f}**"
    assert (seeds["seeds"], seeds["between seeds"]) == ("1, 2", f"{two - one:.4f}")
    assert seeds["held-out bits per byte"] == mean and not lines["hgrn2"]["between seeds"]
    # a name has the rate only where rates differ
    groups = draw.best(draw.grouped([run for run in found if run["model"] in ("hgrn2", "hybrid-1-1")]))
    assert draw.names(groups) == ["HGRN2", "HGRN2 hybrid 1:1, 2 seeds"]
    groups[0][0]["lr"] = 0.01
    assert draw.names(groups) == ["HGRN2, 0.01", "HGRN2 hybrid 1:1, 0.005, 2 seeds"]


def test_runs_of_an_earlier_file_are_drawn_too(runs, tmp_path):
    earlier, both = tmp_path / "earlier.json", tmp_path / "both.json"
    alone = runs.parent / "alone"
    shutil.copytree(runs / "hgrn2-0.005-seed1", alone / "hgrn2-0.005-seed1", dirs_exist_ok=True)
    call("draw.py", alone, "--json", earlier)
    found = json.loads(earlier.read_text())
    found["runs"][0] |= {"seed": 3, "data": found["runs"][0]["data"] | {"vocab": 500}}
    earlier.write_text(json.dumps(found))
    call("draw.py", runs, "--json", both, "--earlier", earlier)
    drawn = json.loads(both.read_text())
    assert [run["seed"] for run in drawn["runs"] if run["model"] == "hgrn2"] == [1, 3]
    # the other corpus has a line of its own
    assert [row["seeds"] for row in drawn["rows"] if row["model"] == "hgrn2"] == ["1", "3"]


@pytest.mark.parametrize("seconds", [10, 1000])
def test_a_run_that_would_be_late_gives_up(seconds):
    import time

    sys.path.append(str(FOLDER))
    import train as program

    # 60 of 260 iterations are done, and each takes half a second, so the rest takes 100 seconds
    log = program.TrainingLog(seq_length=64)
    log.last, log.losses = 260, dict.fromkeys(range(1, 61), 2.0)
    log.milliseconds = {i: 20_000.0 if i < 10 else 500.0 for i in range(1, 61)}
    if seconds > 100:
        program.give_up_if_late(log, time.time() + seconds)
        return
    with pytest.raises(SystemExit, match="0.50 seconds for an iteration, the last one would end 90 seconds too late"):
        program.give_up_if_late(log, time.time() + seconds)


@pytest.mark.parametrize(
    ("raw", "bound", "bands"),
    [
        (0.0, None, [1, 0, 0, 0, 0]),
        # 6 powers of two per token are 384 in a chunk; with a bound of 1/4 they are 124
        (-4.1431347, None, [0, 0, 1, 0, 0]),
        (-4.1431347, 0.25, [1, 0, 0, 0, 0]),
        (-30.0, None, [0, 0, 0, 0, 1]),
    ],
)
def test_the_strength_of_gates_is_what_the_kernels_count(raw, bound, bands):
    import torch

    sys.path.append(str(FOLDER.parent))
    import gate_strength

    f = torch.full((1, 130, 2, 128), 20.0)
    # the strongest channel of a block counts
    f[..., 5::64] = raw
    lower_bound = None if bound is None else torch.full((2, 128), bound)
    assert gate_strength.strength(f, lower_bound)["bands"] == bands


def test_the_held_out_loss_counts_every_token_once(data, runs):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder = runs / "hgrn2-0.005-seed1"
    log = (folder / "piece.0.log").read_text()
    found = [line.split("|")[:2] for line in log.splitlines() if "validation loss at" in line]
    assert [words[0].split()[-1] for words in found] == ["8", "16"] and "Evaluating" not in log
    tokens = json.loads((data / "data.json").read_text())["heldout"]["tokens"]
    by_length = json.loads((folder / "positions.json").read_text())
    # its lengths are views of a file that is mapped while it lives
    dataset = IndexedDataset(str(data / "heldout"))
    documents = dataset.sequence_lengths
    assert max(documents) > 128
    assert [(one["length"], one["sequences"], one["long_documents"]["sequences"]) for one in by_length] == [
        (64, (tokens - 1) // 64, sum(length > 64 for length in documents)),
        (128, (tokens - 1) // 128, sum(length > 128 for length in documents)),
    ]
    assert all(len(x["by_position"]) == 64 for one in by_length for x in (one, one["long_documents"]))


def test_a_run_goes_on_where_it_stopped(data, runs, tmp_path):
    pieces = ("hgrn2", "--evaluations", 2)
    assert train(data, tmp_path, *pieces, "--", "--exit-interval", 8).endswith("call it again\n")
    assert train(data, tmp_path, *pieces).endswith("done\n")
    sys.path.append(str(FOLDER))
    import draw

    one, (two,) = draw.read(runs / "hgrn2-0.005-seed1"), draw.read_all(tmp_path)
    assert one["heldout"][-1][2] == two["heldout"][-1][2] and two["done"]
    assert one["flags"] == two["flags"]
    # a piece's second line is a mean of two, out of which its loss was taken
    assert [loss for _, loss in two["training"]] == pytest.approx([loss for _, loss in one["training"]], abs=1e-4)
    refused = harness.python(
        str(FOLDER / "train.py"), "hgrn2", "--size", "tiny", "--data", str(data), "--out", str(tmp_path),
        "--lr", "5e-3", "--iterations", "32",
    )  # fmt: skip
    assert refused.returncode and "other flags" in refused.stdout


def test_glus_make_up_for_larger_mixers():
    sys.path.append(str(FOLDER))
    import train as quality

    hidden = 768
    assert quality.glu_width("attention", hidden) == quality.glu_width("hybrid", hidden) == 2048
    of_attention = 4 * hidden**2 + 3 * hidden * 2048
    # Megatron's Mamba2: z, x, B, C and dt of a projection, the output's, a convolution of 4 over x, B and C
    mamba = hidden * (4 * hidden + 256 + 24) + 2 * hidden**2 + 4 * (2 * hidden + 256)
    gdn = 5 * hidden**2 + hidden * 2 * 6 + 4 * 3 * hidden
    hybrid = (3 * mamba + 4 * hidden**2) / 4
    for model, mixer in (("mamba2", mamba), ("mamba2-hybrid", hybrid), ("gdn", gdn)):
        layer = mixer + 3 * hidden * quality.glu_width(model, hidden)
        assert layer == pytest.approx(of_attention, rel=5e-3)


def test_sizes_that_cannot_have_a_model_are_refused():
    sys.path.append(str(FOLDER))
    import train as quality

    for model in quality.MODELS:
        size = "100m" if model == "hybrid-7-1" else "125m"
        assert isinstance(quality.mixer_flags(model, size), list)
    with pytest.raises(ValueError, match="hybrid-7-1 repeats 8 layers, and the size 125m has 12: give --size 100m$"):
        quality.mixer_flags("hybrid-7-1", "125m")
    with pytest.raises(ValueError, match="mamba2-hybrid repeats 4 layers, and the size toy has 2: give --size "):
        quality.mixer_flags("mamba2-hybrid", "toy")
    with pytest.raises(ValueError, match="heads of 64 channels, which do not divide the 32 channels of the size toy"):
        quality.mixer_flags("hgrn2-expand-64", "toy")


def test_full_runs_fit_into_the_time():
    sys.path.append(str(FOLDER))
    import side_by_side

    # the longest run first, each on the GPU that has the least to do, and in the order of the seeds there
    assert side_by_side.shared_out([1.0, 3.0, 1.5, 2.0], 2) == [[0, 1], [2, 3]]
    around = side_by_side.AROUND
    # one run per GPU, three runs on two GPUs, and more GPUs than runs
    assert side_by_side.iterations_within(around + 32.5, [0.5, 1.0], 2) == 32
    assert side_by_side.iterations_within(2 * around + 64.5, [1.0, 1.0, 1.0], 2) == 32
    assert side_by_side.iterations_within(around + 32.5, [1.0], 3) == 32
    assert side_by_side.iterations_within(around - 1, [1.0], 1) == 0


def test_the_choice_takes_the_best_rates_and_leaves_out_models_that_do_not_fit(tmp_path, monkeypatch):
    sys.path.append(str(FOLDER))
    import side_by_side

    monkeypatch.setattr(side_by_side, "START", time.monotonic())

    def swept(model, lr, bits):
        speed = {"iterations": 10, "tokens": 10_000, "tokens_per_second": 1000.0}
        data = {"train": {"tokens": 100_000}}
        return {"model": model, "lr": lr, "heldout": [[0, 0, bits]], "data": data, "parameters": 5} | speed

    found = [swept("hgrn2", 1e-3, 2.0), swept("hgrn2", 2e-3, 1.0), swept("attention", 1e-3, 1.0)]
    args = argparse.Namespace(
        models=["hgrn2", "attention"], rates=[1e-3, 2e-3], seeds=[1, 2], gpus=["0", "1"], out=tmp_path, seconds=1000,
        iterations=None, least_tokens=0, most_tokens=None,
    )  # fmt: skip
    # An iteration takes a second. Two runs on each GPU fit into 95% of the time, with a minute for each run.
    choice = side_by_side.choose(args, found)
    assert choice["rates"] == {"hgrn2": 2e-3, "attention": 1e-3} and choice["models"] == ["hgrn2", "attention"]
    assert choice["parameters"] == {"hgrn2": 5, "attention": 5} and choice["iterations"] == 400
    args.least_tokens = 500_000
    assert side_by_side.choose(args, found)["models"] == ["hgrn2"]
    args.iterations = 1200
    choice = side_by_side.choose(args, found)
    assert choice["models"] == ["hgrn2", "attention"] and choice["iterations"] == 1200
    assert json.loads((tmp_path / "choice.json").read_text()) == choice
