"""The benchmarks of Megatron's loop: rows, devices, what they read in logs, files of results, and counted bytes."""

import datetime
import importlib
import json
import os
import re
import shlex
import sys
import threading
from pathlib import Path

import harness
import pytest
import training

from hgrn2_megatron import forms

# last, for it has a file of the name of a standard module
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
figures, pictures, pretrain = map(importlib.import_module, ("figures", "pictures", "pretrain"))
report, runs, scaling = map(importlib.import_module, ("report", "runs", "scaling"))


def row(name: str, sweep: bool = False):
    return scaling.Row.named(name, sweep)


@pytest.mark.parametrize(
    ("name", "processes", "flags"),
    [
        ("one", 1, "--tensor-model-parallel-size 1 --context-parallel-size 1 --pipeline-model-parallel-size 1"),
        ("one, micro-batch 1", 1, "--micro-batch-size 1"),
        ("TP2 CP2", 4, "--micro-batch-size 8"),
        ("TP4 SP", 4, "--micro-batch-size 8 --tensor-model-parallel-size 4 --sequence-parallel"),
        ("TP2 SP, overlapped", 2, "--sequence-parallel --tp-comm-overlap"),
        (
            "TP2 SP, overlapped, graph, micro-batch 8",
            2,
            "--tp-comm-overlap --cuda-graph-impl full_iteration --micro-batch-size 8",
        ),
        ("TP4 SP, graph", 4, "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"),
        ("CP4, graphs of layers", 4, "--context-parallel-size 4 --cuda-graph-impl local"),
        ("PP4 VPP2", 4, "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2"),
        ("TP2 PP2 CP2", 8, "--context-parallel-size 2 --use-distributed-optimizer"),
        ("DP4 FSDP", 4, "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params"),
        ("TP2 PP2 DP16 weak", 64, "--global-batch-size 1024 --overlap-param-gather"),
    ],
)
def test_a_layout_is_its_name(name, processes, flags):
    layout = scaling.Layout.named(name)
    assert layout.processes == processes
    given = f"{' '.join(layout.flags(16, 2))} "
    for flag in re.findall(r"--\S+(?: \w+)?", flags):
        assert f"{flag} " in given
    assert layout.weak == ("--global-batch-size" in given)


def test_every_layout_divides_model_and_batch():
    wide = f"{scaling.MODEL} {shlex.join(row('HGRN2 4096, one').model_flags)}"
    for model in (scaling.MODEL, wide, scaling.TINY):
        layouts = scaling.LAYOUTS if model == scaling.TINY else scaling.GPU_LAYOUTS
        flags = shlex.split(model)

        def size(flag, flags=flags):
            return scaling.value(f"--{flag}", flags)

        for x in map(scaling.Layout.named, layouts):
            batches = size("global-batch-size"), size("micro-batch-size")
            micro_batch = scaling.value("--micro-batch-size", x.flags(*batches))
            micro_batches, rest = divmod(x.batch(size("global-batch-size")), micro_batch * x.dp)
            assert rest == 0 and micro_batches % x.pp == 0, x
            assert size("num-layers") % (x.pp * x.vpp) == 0 and size("num-attention-heads") % x.tp == 0, x
            assert size("seq-length") % (2 * x.cp * x.tp) == 0, x


@pytest.mark.parametrize(
    ("name", "sweep"),
    [
        ("HGRN2, QP2", False),
        ("HGRN2, DP2, fast", False),
        ("HGRN2, TP2 DP2 FSDP", False),
        ("HGRN2, DP2, graph, fast", False),
        ("Mamba, DP2", False),
        ("HGRN2, CP2", True),
    ],
)
def test_unknown_rows_are_refused(name, sweep):
    with pytest.raises(SystemExit, match="no (row|layout)"):
        row(name, sweep)


def test_every_row_but_those_with_fsdp_starts_from_the_saved_weights():
    matrix = scaling.Matrix(shlex.split(scaling.MODEL), Path("weights"))
    loads = {name: "--load" in matrix.flags(row(name)) for name in ("HGRN2, one", "HGRN2, DP4", "HGRN2, DP4 FSDP")}
    assert loads == {"HGRN2, one": True, "HGRN2, DP4": True, "HGRN2, DP4 FSDP": False}


def test_rows_of_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(scaling.torch.cuda, "is_available", lambda: False)
    rows = [row(name) for name in ("hybrid, TP2 CP4", "HGRN2, TP2 CP4", "HGRN2, DP16", "HGRN2, TP2 SP")]
    rows += [row("HGRN2, TP2 SP, graph"), row("HGRN2 4096, DP2")]
    chosen = [row.name for row in scaling.choose(rows, 8)]
    assert chosen == ["hybrid, one", "HGRN2, one", "HGRN2, TP2 SP", "HGRN2, TP2 CP4"]
    left_out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in left_out] == [
        "HGRN2 4096, one", "HGRN2, TP2 SP, graph", "HGRN2 4096, DP2", "hybrid, TP2 CP4", "HGRN2, DP16"
    ]  # fmt: skip
    monkeypatch.setattr(scaling.torch.cuda, "is_available", lambda: True)
    assert "hybrid, TP2 CP4" in [row.name for row in scaling.choose(rows, 8)]
    assert [row.name for row in scaling.choose([row("HGRN2, CP2, 64", True)], 8)] == ["HGRN2, CP2, 64"]


FINISHED = "iteration 6/ 6 |"


def test_runs_side_by_side_share_no_device():
    rows = [row(f"HGRN2, {name}") for name in ("one", "DP2", "TP2 SP", "PP4", "CP2", "PP2")]
    used, lock, meeting = set(), threading.Lock(), threading.Barrier(2)

    def start(row, devices):
        assert len(devices) == row.layout.processes
        with lock:
            assert not used & set(devices)
            used.update(devices)
        if row.layout.name in ("CP2", "PP2"):
            meeting.wait(timeout=30)
        with lock:
            used.difference_update(devices)
        return row.name

    devices = scaling.Devices(list("0123"))
    assert list(scaling.run_all(rows, start, devices, workers=4)) == [row.name for row in rows]
    assert sorted(devices.free) == list("0123")


@pytest.mark.parametrize("workers", [1, 4])
def test_no_longer_length_after_one_that_does_not_fit(workers):
    names = [f"HGRN2, CP{cp}, {length}" for length in (64, 128, 256) for cp in (1, 2)]
    started = []

    def start(row, devices):
        started.append(row.name)
        return "torch.OutOfMemoryError: CUDA out of memory" if row.name == "HGRN2, CP1, 64" else FINISHED

    rows = [row(name, True) for name in names]
    logs = scaling.run_all(rows, start, scaling.Devices(list("01")), workers)
    ends = [scaling.failure(log) for log in logs]
    assert ends == ["out of memory", "", scaling.NOT_TRIED, "", scaling.NOT_TRIED, ""]
    assert sorted(started) == sorted(name for name, end in zip(names, ends, strict=True) if end != scaling.NOT_TRIED)


def log_of(milliseconds: float, losses: list[float], sent: int, slow: int = 4, seen: int = 6) -> str:
    """A run as Megatron 0.19.2 prints it, whose first iterations are slow; the first sends more, later ones unseen."""
    lines = []
    for i, loss in enumerate(losses, 1):
        lines += [
            f"bytes sent: {2 * sent if i == 1 else sent if i <= seen else 20}",
            f" [2026-11-27 01:11:18.911005] iteration {i:8d}/{len(losses):8d} | consumed samples:            4 | "
            f"elapsed time per iteration (ms): {milliseconds if i > slow else 9999:.1f} | throughput per GPU "
            f"(TFLOP/s/GPU): 400.5 | learning rate: 8.75E-04 | global batch size:     4 | lm loss: {loss:.6E} | "
            "loss scale: 1.0 | grad norm: 3.200 | number of skipped iterations:   0 |",
            f"[Rank 0] (after {i} iterations) memory (MB) | allocated: 1.00 | max allocated: 2048.00 | reserved: 9.00",
        ]
    return "\n".join(lines)


def test_lines_of_the_table(tmp_path):
    common = shlex.split("--seq-length 1000 --global-batch-size 2 --global-batch-size 4")
    matrix = scaling.Matrix(common, tmp_path)
    losses = [4.5, 4.4, 4.3, 4.2, 4.1, 4.0]
    one = matrix.read(row("HGRN2, one"), log_of(100, losses, 0))
    assert one == "| HGRN2, one | 40,000 | 100.0 | 400.5 | 2.0 | 4.5000 -> 4.0000 |  |  | 0.00 |"
    apart = [4.5, 4.4, 4.302, 4.2, 4.1, 4.001]
    tp2 = matrix.read(row("HGRN2, TP2 SP"), log_of(80, apart, 3 << 20))
    assert tp2 == "| HGRN2, TP2 SP | 25,000 | 62.5 | 400.5 | 2.0 | 4.5000 -> 4.0010 | 2.0e-03 | 0.0e+00 | 3.00 |"
    weak = matrix.read(row("HGRN2, DP2 weak"), log_of(110, apart, 1 << 20))
    assert weak == "| HGRN2, DP2 weak | 36,364 | 90.9 | 400.5 | 2.0 | 4.5000 -> 4.0010 |  |  | 1.00 |"
    # of as large a batch, if not of one process's
    cp2_weak = matrix.read(row("HGRN2, CP2 weak"), log_of(110, losses, 1 << 20))
    assert "| 4.5000 -> 4.0000 | 2.0e-03 | 0.0e+00 |" in cp2_weak
    # replayed, nothing is sent through Python
    graph = matrix.read(row("HGRN2, TP2 SP, graph"), log_of(80, apart, 3 << 20, seen=3))
    assert graph == tp2.replace("SP", "SP, graph")
    # if the model does not fit on one process, the first layout on which it fits
    assert "out of memory" in matrix.read(row("HGRN2 4096, one"), "torch.OutOfMemoryError: CUDA out of memory")
    matrix.read(row("HGRN2 4096, DP2 weak"), log_of(90, apart, 0))
    assert "| 25,000 |  | 400.5 |" in matrix.read(row("HGRN2 4096, DP2"), log_of(80, losses, 0))
    assert "| 2.0e-03 | 0.0e+00 |" in matrix.read(row("HGRN2 4096, TP2 SP"), log_of(80, apart, 0))
    # a run that dies on its way has no figures
    died = log_of(80, apart, 0).replace(f"/{6:8d}", f"/{7:8d}")
    assert matrix.read(row("HGRN2, DP2"), died) == "| HGRN2, DP2 | failed: see the log |  |  |  |  |  |  |  |"

    sweep = scaling.Sweep(common, tmp_path)
    sweep.read(row("hybrid, CP1, 1000", True), log_of(100, losses, 0, slow=2))
    cp2 = sweep.read(row("hybrid, CP2, 2000", True), log_of(125, losses, 1 << 19, slow=2))
    assert cp2 == "| hybrid, CP2, 2000 | 125.0 | 8,000 | 80.0 | 400.5 | 2.0 | 0.50 |"
    pytest.importorskip("matplotlib")
    for kind, draw, name in ((matrix, pictures.bars, "matrix.png"), (sweep, pictures.lines, "sweep.png")):
        rows = [row(name, kind is sweep) for name in kind.figures]
        pictures.save(draw, kind.figures, rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0


def test_lines_of_the_table_of_one_gpu():
    def log(milliseconds: int, more: str = "") -> str:
        return f"HGRN2: 2 of 2 layers\n{log_of(milliseconds, [4.5, 4.4, 4.3, 4.2], 0, slow=2)}\n{more}"

    def figures_of(log):
        return figures.Figures.of(log, pretrain.TOKENS, 1, warm_up=2)

    times = {"attention": (1000, 900, 1100), "HGRN2": (800, 800, 801), "HybridModel": (640, 800, 900)}
    known = {f"{model}, 4096": [figures_of(log(ms)) for ms in times[model]] for model in times}
    result = pretrain.result("HybridModel, 4096", log(900, "mtp_1 loss: 4.6\nmtp_1 loss: 4.5"), known)
    line = "| HybridModel, 4096 | 40,960 | 1.250 | 1.000 | 2.0 | 4.500 -> 4.200 | HGRN2: 2 of 2 layers |"
    assert pretrain.line(result) == line
    assert result["losses"] == [4.5, 4.4, 4.3, 4.2] and result["losses of the MTP head"] == [4.6, 4.5]
    assert result["tokens/s of each run"] == [51200, 40960, 36409]
    # of other lengths there is nothing to compare with
    assert pretrain.line(pretrain.result("HGRN2, 16384", log(800), {"HGRN2, 16384": known["HGRN2, 4096"][:1]})) == (
        "| HGRN2, 16384 | 40,960 |  |  | 2.0 | 4.500 -> 4.200 | HGRN2: 2 of 2 layers |"
    )
    result = pretrain.result("HGRN2, 4096", "torch.OutOfMemoryError: CUDA out of memory", {"HGRN2, 4096": [None]})
    assert pretrain.line(result) == "| HGRN2, 4096 | out of memory | | | | | |"


def test_rows_take_turns_and_a_run_that_fails_keeps_the_others(tmp_path, monkeypatch):
    started = []

    def start(script, launcher, flags):
        started.append((script.name, launcher, flags[flags.index("--spec") + 1]))
        return "torch.OutOfMemoryError: CUDA out of memory" if len(started) == 3 else log_of(800, [4.5, 4.4, 4.3], 0)

    monkeypatch.setattr(pretrain, "run", start)
    files = ["--out", str(tmp_path / "found.json"), "--logs", str(tmp_path / "logs")]
    rows = ["HGRN2, 4096", "HybridModel, 4096"] * 2
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "examples", *files, "--rows", *rows])
    monkeypatch.chdir(harness.ROOT)
    pretrain.main()
    assert started == [("pretrain_gpt.py", True, "hgrn2"), ("pretrain_hybrid.py", True, "hgrn2_stack")] * 2
    gpt, stack = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (tmp_path / "logs" / "HybridModel-4096-run-2.log").is_file()
    assert gpt["tokens/s of each run"] == [3277, None] and stack["tokens/s of each run"] == [3277, 3277]


def test_the_forms_of_a_row_are_the_same_model():
    flags = pretrain.command_of("HybridModel MTP HGRN2, 4096")[2]
    pattern = flags[flags.index("--hybrid-layer-pattern") + 1]
    layers, experts = forms.gpt_pattern(pattern)
    assert pattern.endswith("-/M-") and not any(experts)
    assert layers == "H" * scaling.value("--num-layers", flags)


def test_a_file_of_results_says_where_its_rows_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "benchmarks/scaling.py", "--rows", "HGRN2, one"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    matrix = scaling.Matrix(shlex.split("--seq-length 1000 --global-batch-size 4"), tmp_path)
    matrix.read(row("HGRN2, one"), log_of(100, [4.5, 4.4, 4.3, 4.2, 4.1, 4.0], 1 << 20))
    matrix.read(row("HGRN2, DP2"), "torch.OutOfMemoryError: CUDA out of memory")
    report.write(tmp_path / "new" / "run.json", matrix.results, model="small")
    found = json.loads((tmp_path / "new" / "run.json").read_text())
    assert found["command"] == "python benchmarks/scaling.py --rows 'HGRN2, one'"
    assert found["versions"].keys() >= {"torch", "triton", "megatron-core"}
    assert found["date"] == datetime.date.today().isoformat() and found["machine"] and found["model"] == "small"
    one, died = found["rows"]
    assert one["run"] == "HGRN2, one" and one["tokens/s per GPU"] == 40000 and one["MiB sent per step"] == 1
    assert died == {"run": "HGRN2, DP2", "note": "out of memory"}


def test_a_file_of_results_ends_in_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "Megatron-LM", "--out", "folder"])
    with pytest.raises(SystemExit):
        runs.parse(runs.command_line("A benchmark."))
    assert "'folder' does not end in .json" in capsys.readouterr().err


def test_a_run_that_hangs_is_ended(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import os, time\nprint('hangs as', os.getpid(), flush=True)\ntime.sleep(600)\n")
    log = runs.run(script, False, [], timeout=25)
    assert scaling.failure(log) == runs.OVERTIME
    (process,) = re.findall(r"hangs as (\d+)", log)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def sent_by_rank_0(*flags: str) -> tuple[set[float], str]:
    """Bytes of each iteration of a run of two processes but the first, and its output."""
    launcher = ("-m", "benchmarks.counted")
    done = training.launch(*training.HGRN2, *flags, "--eval-iters", 0, num_processes=2, launcher=launcher)
    assert done.returncode == 0, done.stdout[-3000:]
    sent = figures.numbers("bytes sent", done.stdout)
    assert len(sent) == 8
    return set(sent[1:]), done.stdout


# the loss, its tokens and the norms: a few numbers beside what is counted
SCALARS = 100


def test_data_parallelism_sends_every_gradient():
    (sent,), output = sent_by_rank_0()
    (parameters,) = re.findall(r"number of parameters on .*: (\d+)", output)
    # all-reduce in fp32: 2 (n - 1) / n
    assert 0 <= sent - 4 * int(parameters) <= SCALARS


def test_a_pipeline_sends_activations():
    (sent,), _ = sent_by_rank_0("--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights")
    layers, hidden, length, batch = (
        scaling.value(f"--{flag}", training.FLAGS)
        for flag in ("num-layers", "hidden-size", "seq-length", "global-batch-size")
    )
    # and the gradient of the lower bounds, which both stages have, in an all-reduce
    assert 0 <= sent - 4 * (length * hidden * batch + layers * hidden) <= SCALARS
