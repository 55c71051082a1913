import copy
import math
import sys

import harness
import pytest

training_log = harness.load("examples/training_log.py")


def iteration(number, loss, ms, last=13):
    """A line as Megatron 0.19.2 prints it."""
    return (
        f" [2026-11-23 22:33:27.360237] iteration {number:8d}/{last:8d} | "
        f"consumed samples: {4 * number:12d} | elapsed time per iteration (ms): {ms:.1f} | "
        f"learning rate: 8.000000E-04 | global batch size:     4 | lm loss: {loss:.6E} | loss scale: 1.0 | "
        "grad norm: 2.491 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def read(first, losses, heldout):
    """The log of a run over `losses`, with Megatron's second line, a mean of two."""
    log = training_log.TrainingLog(seq_length=64)
    printed = list(losses)
    printed[1] = (losses[0] + losses[1]) / 2
    for number, loss in enumerate(printed, first):
        assert log.read(iteration(number, loss, 90 + 10 * number)) == number
    rule = "-" * 94
    for line in (
        rule,
        f" validation loss at iteration 13 | lm loss value: {heldout:.6E} | lm loss PPL: 5.9E+01 | ",
    ):
        assert log.read(line) is None
    return log


LOSSES = [4.863689, 4.673349, 4.507158, 4.430210, 4.314510, 4.237005, 4.243123]


def test_reads_what_megatron_prints():
    log = training_log.TrainingLog(seq_length=64)
    text = [
        "HGRN2: 2 of 2 layers, expand 32, lower bounds learned, op=pytorch",
        " > number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (0, 0, 0): 139840",
        "Total number of parameters in billions: 0.00",
        iteration(1, 4.863689, 95.0),
        iteration(2, 4.768519, 81.1),
        iteration(3, 4.507158, 63.3),
        " validation-0 loss at iteration 3 on validation set | lm loss value: 4.132353E+00 | PPL: 6E+01 | ",
    ]
    assert [log.read(line) for line in text] == [None, None, None, 1, 2, 3, None]
    # the second line was a mean over both iterations
    assert log.losses == {1: 4.863689, 2: pytest.approx(4.673349), 3: 4.507158}
    assert log.milliseconds == {1: 95.0, 2: pytest.approx(67.2), 3: 63.3}
    assert log.heldout == {3: 4.132353}
    assert (log.last, log.batch, log.parameters) == (13, 4, 139840)
    assert log.tokens_per_second() == pytest.approx(1000 * 4 * 64 / 67.2)
    assert log.tokens_per_second(100) == 2560


def test_bits():
    assert training_log.bits(math.log(256)) == pytest.approx(8)


def test_equal_resume_passes_and_any_difference_is_named():
    full = read(7, LOSSES, 4.071991)
    resumed = read(10, LOSSES[3:], 4.071991)
    assert training_log.first_difference(full, resumed) is None
    for name, key in (("losses", 10), ("losses", 12), ("losses", 13), ("heldout", 13)):
        other = copy.deepcopy(resumed)
        getattr(other, name)[key] += 1e-6
        word = "held-out loss at" if name == "heldout" else "training loss of"
        assert training_log.first_difference(full, other).startswith(f"{word} iteration {key}:")
    # the loss that Megatron only prints within a mean is known to fewer digits, and compared too
    other = copy.deepcopy(resumed)
    other.losses[11] += 1e-5
    assert "iteration 11" in training_log.first_difference(full, other)
    other = copy.deepcopy(resumed)
    other.losses[12] = math.nan
    assert "iteration 12" in training_log.first_difference(full, other)


def test_resume_that_stops_early_is_no_success():
    full = read(7, LOSSES, 4.071991)
    assert "did not reach" in training_log.first_difference(full, read(10, LOSSES[3:6], 4.071991))
    silent = read(10, LOSSES[3:], 4.071991)
    silent.heldout.clear()
    assert "did not reach" in training_log.first_difference(full, silent)


def test_failing_run_shows_its_reason_and_exits(tmp_path, capsys):
    program = "print('a line', '[rank0]: the reason', *['of torchrun'] * 40, sep='\\n'); raise SystemExit(3)"
    log = tmp_path / "log"
    lines = []
    with pytest.raises(SystemExit, match="exit status 3.*log"):
        lines.extend(training_log.run_lines([sys.executable, "-c", program], log))
    assert capsys.readouterr().err == "[rank0]: the reason\n"
    assert log.read_text().splitlines() == lines == ["a line", "[rank0]: the reason", *["of torchrun"] * 40]
