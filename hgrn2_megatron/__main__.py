"""The launcher: `torchrun ... -m hgrn2_megatron pretrain_gpt.py --spec hgrn2 ...` runs any unmodified Megatron script.

It takes the one-word spec, refuses one that cannot be imported, adds the `--hgrn2-*` flags, sets what makes a true
HGRN2 block where the user is silent, and turns the CPU mode on where there is no CUDA device.
"""

import importlib
import importlib.metadata
import os
import runpy
import sys

from hgrn2_megatron.config import UsageError

USAGE = """usage: [torchrun ...] -m hgrn2_megatron SCRIPT [Megatron's flags] --spec hgrn2 [--hgrn2-* flags]
       python -m hgrn2_megatron doctor      what this machine has, and whether it computes HGRN2
       python -m hgrn2_megatron patch MEGATRON_LM [--check | --reverse]
                                            make --spec hgrn2 work in a checkout without this launcher
       python -m hgrn2_megatron convert SOURCE OUT [--dtype bf16|fp32] [--no-check] [...]
                                            a Hugging Face model of fla's HGRN2 to a Megatron checkpoint, or back"""


def check_spec(spec: list[str] | None) -> None:
    """Refuse a spec that is unknown or cannot be imported, for which Megatron 0.19 would silently train attention.

    Args:
        spec: the words of --spec, None where it is not given.

    Raises:
        UsageError: it says what is wrong with the spec.
    """
    from hgrn2_megatron import arguments

    match arguments.full_spec(spec):
        case [module, name]:
            _import_spec(module, name)
        # the one word that some Megatron scripts know, and those that a patched Megatron does
        case [word] if (
            word != "local" and word not in importlib.metadata.entry_points(group="megatron.layer_specs").names
        ):
            raise UsageError(f"--spec {word}: unknown; did you mean --spec hgrn2?")


def _import_spec(module: str, name: str) -> None:
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
    from hgrn2_megatron import arguments, megatron_hooks

    sys.argv = argv
    check_spec(arguments.spec_of(argv[1:]))
    megatron_hooks.install_arguments(cpu.DEFAULTS if cpu.needed() else {})
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "doctor":
        from hgrn2_megatron import doctor

        sys.exit(doctor.main())
    try:
        if sys.argv[1] == "patch":
            from hgrn2_megatron import patch

            return patch.main(sys.argv[2:])
        if sys.argv[1] == "convert":
            from hgrn2_megatron.conversion import command

            return command.main(sys.argv[2:])
        launch(sys.argv[1:])
    except UsageError as error:
        print(f"hgrn2_megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
