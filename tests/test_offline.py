"""scripts/offline: the jobs that a GPU starts, what happens at the deadline, and the pieces that travel."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest

FOLDER = harness.ROOT / "scripts" / "offline"
SCRIPT = FOLDER / "jobs.py"
jobs, pieces, launchable = (harness.load(f"scripts/offline/{name}.py") for name in ("jobs", "pieces", "launchable"))


def job(name: str, seconds: float, *needs: str, turn: bool = False, beside: bool = False):
    return jobs.Job(Path(name), seconds, needs, turn, beside)


FIRST, TRAINING, LONG = job("1", 10), job("2", 100, "data", turn=True), job("3", 1000)


@pytest.mark.parametrize(
    ("ready", "left", "busy", "chosen"),
    [
        (set(), 500, None, FIRST),
        (set(), 5, None, None),
        # a job that would disturb the one that runs is not started, and no later job passes it
        ({"data"}, 500, 20, None),
        (set(), 25, 20, None),
        ({"data"}, 500, None, FIRST),
    ],
)
def test_a_gpu_takes_the_first_job_that_can_run(ready, left, busy, chosen):
    assert jobs.choose([FIRST, TRAINING, LONG], ready, left, busy) is chosen


@pytest.mark.parametrize(
    ("ready", "left", "busy", "chosen"),
    [
        ({"data"}, 500, 20, TRAINING),
        ({"data"}, 110, 20, None),
        (set(), 500, None, None),
        (set(), 5000, None, LONG),
        # this job is ready, but not while another one runs
        (set(), 5000, 20, None),
    ],
)
def test_a_job_with_a_turn_starts_beside_another(ready, left, busy, chosen):
    assert jobs.choose([TRAINING, LONG], ready, left, busy) is chosen


def test_a_job_that_disturbs_starts_beside_another():
    tests = job("4", 100, beside=True)
    # it waits for nobody, so the time of the job that runs is not added
    assert jobs.choose([LONG, tests], set(), 110, 50) is tests
    assert jobs.choose([LONG, tests], set(), 90, 50) is None
    assert jobs.choose([LONG, tests], set(), 5000, 50) is None


def test_jobs_run_in_order_until_the_deadline(tmp_path):
    folder, logs, ready = (tmp_path / name for name in ("jobs", "logs", "ready"))
    folder.mkdir()
    scripts = {
        "1-first": "# seconds: 1\n# each: a b\necho $1 on $CUDA_VISIBLE_DEVICES",
        "2-training": "# seconds: 2\n# turn\necho waits; flock $TURN sh -c 'echo turn; sleep 2'",
        "2b-beside": "# seconds: 1\n# beside\nflock -n $TURN echo alone || echo beside",
        "3-needs": "# seconds: 1\n# needs: data\nls $0",
        "4-late": "# seconds: 2\ntrap 'echo asked' TERM; sleep 60; sleep 60; echo never",
        "5-long": "# seconds: 1000\ntrue",
    }
    for name, text in scripts.items():
        (folder / f"{name}.sh").write_text(text + "\n")
    words = [sys.executable, SCRIPT, folder, "--logs", logs, "--ready", ready, "--until", time.time() + 18]
    begin = time.monotonic()
    done = subprocess.run([*map(str, words), "--gpus", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 10 < time.monotonic() - begin < 25
    # nothing of the late job is left
    assert subprocess.run(["pgrep", "-f", str(folder)], capture_output=True).returncode == 1
    started = [line.split("s  ")[1].split()[0] for line in done.stdout.splitlines() if " starts " in line]
    assert started == ["1-first-a", "1-first-b", "2-training", "2b-beside", "4-late"]
    assert "left that fits: 3-needs, 5-long" in done.stdout
    assert [(logs / f"1-first-{word}.log").read_text() for word in "ab"] == ["a on 7\n", "b on 7\n"]
    assert (logs / "2-training.log").read_text() == "waits\nturn\n"
    assert (logs / "2b-beside.log").read_text() == "beside\n"
    assert (logs / "4-late.log").read_text().endswith("asked\n") and "4-late ends with status -15" in done.stdout


def test_a_job_says_how_long_it_takes(tmp_path):
    (tmp_path / "1.sh").write_text("true\n")
    words = (tmp_path, "--logs", tmp_path, "--ready", tmp_path, "--until", 0)
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2 and "1.sh does not say how long it takes" in done.stderr


def test_every_job_of_the_folder_can_be_read():
    found = [job for path in sorted((FOLDER / "jobs").glob("*.sh")) for job in jobs.Job.read(path)]
    known = {"base", "data", "te", "mamba", "triton"}
    assert found and all(set(one.needs) <= known and "base" in one.needs for one in found)
    # the functions `train` and `sweep` of env.sh wait for the turn
    assert all(one.turn == bool(re.search(r"(^|{ )(train|sweep) ", one.path.read_text(), re.M)) for one in found)


def test_pieces_are_small_and_in_order(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "pieces"
    parts.mkdir()
    sizes = {"te.part00": 40, "base.part00": 30, "caches.part00": 20, "train.01.xz": 50, "triton.part00": 60}
    for name, size in sizes.items():
        (parts / name).write_bytes(bytes(size))
    groups = pieces.divide(list(parts.iterdir()), largest=60)
    names = [[path.name for path in group] for group in groups]
    assert names == [["base.part00", "caches.part00"], ["train.01.xz"], ["te.part00"], ["triton.part00"]]
    with pytest.raises(ValueError, match="cut it into parts"):
        pieces.divide(list(parts.iterdir()), largest=59)
    pieces.main(parts, out)
    assert sorted(path.name for path in (out / "01").iterdir()) == sorted([*sizes, "files.txt"])
    assert (out / "01" / "files.txt").read_text().split() == sorted(sizes)


def test_a_cache_keeps_what_a_launch_needs(tmp_path):
    folder = tmp_path / "KEY"
    folder.mkdir()
    paths = {f"kernel.{end}": str(folder / f"kernel.{end}") for end in ("ttir", "ptx", "cubin", "json")}
    for path in paths.values():
        Path(path).write_text("{}")
    group = folder / "__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": paths}))
    assert launchable.reduce(tmp_path) == 2
    assert {path.name for path in folder.iterdir()} == {"kernel.cubin", "kernel.json", group.name}
    assert set(json.loads(group.read_text())["child_paths"]) == {"kernel.cubin", "kernel.json"}


# stands for Python: it installs nothing, finds one GPU, and runs jobs until the file `end` is there
PYTHON = """#!/bin/sh
case "$*" in
  -c*) echo 0 ;;
  *jobs.py*) echo "$@"; touch "$WORK/jobs"; while [ ! -e "$WORK/end" ]; do sleep 0.1; done ;;
esac
"""


def test_a_machine_installs_what_has_arrived(tmp_path):
    """The packages, and the parts of another Triton that arrive while jobs run. wait.sh says what is there."""
    work, tree, inside, programs = (tmp_path / name for name in ("work", "tree", "inside", "programs"))
    inside.mkdir()
    (inside / "module.py").write_text("x = 1\n" * 1000)
    packed = tmp_path / "triton.tar.xz"
    subprocess.run(["tar", "cJf", packed, "-C", inside, "."], check=True)
    subprocess.run(["tar", "cf", tmp_path / "base.tar", "-C", inside, "."], check=True)
    shutil.copytree(FOLDER, tree / "scripts" / "offline")
    programs.mkdir()
    (programs / "python3").write_text(PYTHON)
    (programs / "python3").chmod(0o755)
    env = os.environ | {"WORK": str(work), "PATH": f"{programs}:{os.environ['PATH']}"}
    data, log = packed.read_bytes(), work / "log" / "install.log"
    files = {
        "base.part00": (tmp_path / "base.tar").read_bytes(),
        "caches.part00": data,
        "triton.part00": data[:100],
        "triton.part01": data[100:],
    }

    def arrive(name: str, content: bytes | None = None):
        folder = tree / "pieces" / name
        folder.mkdir(parents=True)
        (folder / name).write_bytes(files[name] if content is None else content)
        (folder / "files.txt").write_text("\n".join(files) + "\n")
        subprocess.run(["bash", "scripts/offline/install.sh", f"pieces/{name}/", "1000"], cwd=tree, env=env, check=True)
        shutil.rmtree(tree / "pieces")

    def wait(*words) -> subprocess.CompletedProcess:
        command = ["bash", "scripts/offline/wait.sh", *map(str, words)]
        return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)

    def names(archive: Path) -> list[str]:
        return subprocess.run(["tar", "tJf", archive], capture_output=True, text=True, check=True).stdout.split()

    def within(seconds: float, path: Path, text: str = "") -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (path.exists() and text in path.read_text()):
            time.sleep(0.1)
        return path.exists() and text in path.read_text()

    try:
        begin = time.monotonic()
        refused = wait(60)
        assert refused.returncode == 1 and "from the first one on" in refused.stdout and time.monotonic() < begin + 5
        arrive("base.part00")
        assert not within(2, work / "ready" / "base")
        arrive("caches.part00")
        assert within(20, work / "ready" / "base") and within(20, work / "jobs")
        arrive("triton.part01")
        assert not within(2, work / "ready" / "triton")
        # a part that is damaged makes the step fail, and the next call tries it again
        arrive("triton.part00", bytes(100))
        assert within(20, log, "triton failed: see")
        arrive("triton.part00")
        assert within(20, log, "triton is ready")
        waited = wait(1, tmp_path)
        assert waited.returncode == 0 and "triton is ready" in waited.stdout and " s left" in waited.stdout
        assert "log/install.log" in names(tmp_path / "log.tar.xz") and not (tmp_path / "caches.tar.xz").exists()
        # in the last minute it also packs new files of the caches, and it does not wait when no job is left
        (work / "until").write_text(str(int(time.time()) + 30))
        (work / "cache-new").mkdir()
        (work / "cache-new" / "tuned.json").touch()
        with open(work / "log" / "jobs.log", "a") as file:
            file.write("no job is left that fits: all have run\n")
        begin = time.monotonic()
        assert wait(60, tmp_path).returncode == 0 and time.monotonic() < begin + 5
        assert names(tmp_path / "caches.tar.xz") == ["cache-new/tuned.json"]
    finally:
        (work / "end").touch()
    assert (work / "triton-3.9.0" / "module.py").read_text() == (inside / "module.py").read_text()
    assert (work / "checkout" / "scripts").exists() and not (work / "checkout" / "pieces").exists()
