"""Runs of Megatron-LM's pretraining, and the tables that benchmarks make of them."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OVERTIME = "ended: it took too long"


def run(
    script: Path,
    launcher: bool,
    flags: list[str],
    processes: int = 1,
    module: str = "hgrn2_megatron",
    more_env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Megatron's output for one row; `module` is the launcher, `timeout` the seconds after which the run is ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", module, str(script)] if launcher else [str(script)]
    path = [str(ROOT), str(ROOT / "kernels"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": ":".join(path), "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | (more_env or {})
    # a checkout builds its dataset helpers with the python3 of PATH
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    process = subprocess.Popen(command + flags, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        # torchrun ends its processes when it is asked to end
        process.terminate()
        return f"{process.communicate()[0]}\n{OVERTIME}\n"


def command_line(doc: str) -> argparse.ArgumentParser:
    """What every benchmark of Megatron's loop takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("megatron_lm", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the table and the full logs")
    parser.epilog = "What follows -- are further flags for Megatron."
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, of which `extra` is what follows --."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end], argparse.Namespace(extra=words[end + 1 :]))


def script_in(megatron_lm: Path) -> Path:
    """A checkout's pretrain_gpt.py."""
    script = megatron_lm.resolve() / "pretrain_gpt.py"
    if not script.is_file():
        raise SystemExit(f"{script} is not a file: give the folder of a Megatron-LM checkout")
    return script


def file_stem(name: str) -> str:
    """A row's name in the names of its files."""
    return name.replace(", ", "-").replace(" ", "-")


def make_table(head: list[str], runs: Iterable[tuple[str, str, str]], out: Path | None):
    """Print the lines of runs (name, log, line of the table) as they end, then the table; keep all of it in out."""
    table = list(head)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    for name, log, line in runs:
        if out:
            (out / f"{file_stem(name)}.log").write_text(log)
        table.append(line)
        print(line, flush=True)
    print("\n".join(table))
    if out:
        (out / "table.md").write_text("\n".join(table) + "\n")
