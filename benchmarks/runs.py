"""Start Megatron-LM's pretraining once for each row of a benchmark, and collect the rows of its table."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parents[1]
# the last line of the log of a run that was stopped
OVERTIME = "stopped: it took too long"


def run(
    script: Path,
    launcher: bool,
    flags: list[str],
    processes: int = 1,
    module: str = "hgrn2_megatron",
    more_env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Run a script of Megatron-LM with torchrun, and return what it printed.

    Args:
        script: a file of a Megatron-LM checkout.
        launcher: True if `module` starts the script, False if torchrun starts it directly.
        flags: flags of the script.
        processes: number of ranks, all on this host.
        module: the launcher.
        more_env: environment variables to set in addition to those of this process.
        timeout: seconds after which the run is stopped; its output then ends with OVERTIME.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", module, str(script)] if launcher else [str(script)]
    path = [str(ROOT), str(ROOT / "kernels"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    # Tensor parallelism needs 1 connection, and Megatron-FSDP refuses 1.
    connections = "8" if "--use-megatron-fsdp" in flags else "1"
    env = os.environ | {"PYTHONPATH": ":".join(path), "CUDA_DEVICE_MAX_CONNECTIONS": connections} | (more_env or {})
    # a checkout builds its dataset helpers with the first python3 in PATH
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    process = subprocess.Popen(command + flags, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        # torchrun ends its ranks when it is terminated
        process.terminate()
        return f"{process.communicate()[0]}\n{OVERTIME}\n"


def command_line(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every benchmark of Megatron's loop takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("megatron_lm", type=Path, help="folder of a Megatron-LM checkout")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the table and the log of every run there")
    report.add_option(parser)
    parser.epilog = "Flags after -- are passed to Megatron."
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of this process. The words after -- become the argument `extra`."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end], argparse.Namespace(extra=words[end + 1 :]))


def script_in(megatron_lm: Path) -> Path:
    """Return the path of a checkout's pretrain_gpt.py. Stop the program if there is none."""
    script = megatron_lm.resolve() / "pretrain_gpt.py"
    if not script.is_file():
        raise SystemExit(f"{script} is not a file: give the folder of a Megatron-LM checkout as the first argument")
    return script


def file_stem(name: str) -> str:
    """Return the name of a row in the form that the names of its files have."""
    return name.replace(", ", "-").replace(" ", "-")


def make_table(head: list[str], runs: Iterable[tuple[str, str, str]], logs: Path | None):
    """Print each line of a table when its run ends, and then print the whole table.

    Args:
        head: the lines above the rows.
        runs: for each row its name, the log of its run and its line of the table.
        logs: folder that keeps table.md and the log of every run, or None.
    """
    table = list(head)
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    for name, log, line in runs:
        if logs:
            (logs / f"{file_stem(name)}.log").write_text(log)
        table.append(line)
        print(line, flush=True)
    print("\n".join(table))
    if logs:
        (logs / "table.md").write_text("\n".join(table) + "\n")
