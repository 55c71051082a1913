"""The launcher: `torchrun ... -m hgrn2_megatron pretrain_gpt.py --spec hgrn2 ...` runs any unmodified Megatron script.

It resolves the one-word spec, refuses one that cannot be imported, adds the `--hgrn2-*` flags, sets what makes a true
HGRN2 block where the user is silent, and turns the CPU mode on where there is no CUDA device.
"""

import importlib
import os
import runpy
import sys

from hgrn2_megatron.config import UsageError

USAGE = """usage: [torchrun ...] -m hgrn2_megatron SCRIPT [Megatron's flags] --spec hgrn2 [--hgrn2-* flags]
       python -m hgrn2_megatron doctor      what this machine has, and whether it computes HGRN2"""


def resolve_spec(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Rewrite `--spec hgrn2` to the two words Megatron takes.

    Args:
        argv: command line, script first.

    Returns:
        The command line with the spec in full, and the spec's words, None where no --spec was given.

    Raises:
        UsageError: a spec that is unknown or cannot be imported; Megatron 0.19 would silently train attention.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--spec=") else [arg])]
    if "--spec" not in argv:
        return argv, None
    start = argv.index("--spec") + 1
    end = next((i for i in range(start, len(argv)) if argv[i].startswith("--")), len(argv))
    spec = argv[start:end]
    if spec in (["hgrn2"], ["hgrn2_stack"]):
        spec = ["hgrn2_megatron.spec", *spec]
    elif len(spec) == 1 and spec != ["local"]:  # the one word that some Megatron scripts know
        raise UsageError(f"--spec {spec[0]}: unknown; did you mean --spec hgrn2?")
    if len(spec) == 2:
        _import_spec(*spec)
    return argv[:start] + spec + argv[end:], spec


def _import_spec(module: str, name: str):
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UsageError(f"--spec {module} {name} cannot be imported: {error}") from error
    if not found:
        raise UsageError(f"--spec {module} {name}: module {module} has no {name}")


def launch(argv: list[str]) -> None:
    """Run `argv[0]` as a script with the rest as its command line, with HGRN2 known to Megatron."""
    script = argv[0]
    if not os.path.isfile(script):
        raise UsageError(f"{script} is not a file; {USAGE}")
    # as python does for a script: its folder first, so that a checkout's megatron is the one imported
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))

    from hgrn2_megatron import cpu

    # before anything imports Megatron, which decides at import whether to compile
    cpu.install()
    sys.argv, spec = resolve_spec(argv)

    from hgrn2_megatron import arguments, megatron_hooks

    defaults = dict(cpu.DEFAULTS) if cpu.needed() else {}
    if arguments.is_hgrn2_spec(spec):
        defaults |= arguments.silent_defaults()
    megatron_hooks.install_arguments(defaults)
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "doctor":
        from hgrn2_megatron import doctor

        sys.exit(doctor.main())
    try:
        launch(sys.argv[1:])
    except UsageError as error:
        print(f"hgrn2_megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
