"""The launcher: `torchrun ... -m hgrn2_megatron pretrain_gpt.py --spec hgrn2 ...` runs an unmodified Megatron script.

It accepts the one-word spec, and refuses a spec that cannot be imported. It adds the `--hgrn2-*` flags and sets the
defaults of an HGRN2 block. On a machine without a CUDA device it turns the CPU mode on.
"""

import importlib
import importlib.metadata
import os
import runpy
import sys

from hgrn2_megatron.config import UsageError

USAGE = """usage: torchrun ... -m hgrn2_megatron SCRIPT [Megatron's flags] --spec hgrn2 [--hgrn2-* flags]
       python -m hgrn2_megatron doctor      check this machine and the HGRN2 operator on it
       python -m hgrn2_megatron patch MEGATRON_LM [--check | --reverse]
                                            make --spec hgrn2 work in a checkout without this launcher
       python -m hgrn2_megatron convert SOURCE OUT [--dtype bf16|fp32] [--no-check] [...]
                                            convert a Hugging Face model of fla's HGRN2 to a Megatron checkpoint,
                                            or a Megatron checkpoint to a Hugging Face model"""


# Megatron's scripts that take --spec and build neither a GPT nor a HybridModel
OTHER_MODELS = ("pretrain_bert.py", "pretrain_t5.py", "pretrain_vlm.py")


def check_spec(spec: list[str] | None) -> None:
    """Refuse a spec that is unknown or cannot be imported. Megatron 0.19 would silently train attention instead.

    Args:
        spec: words of --spec, or None if it is not given.

    Raises:
        UsageError: the spec is unknown, or it cannot be imported.
    """
    from hgrn2_megatron import arguments

    match arguments.full_spec(spec):
        case [] | [_, _, _, *_] as words:
            raise UsageError(f"--spec has {len(words)} words: give --spec hgrn2, or a module and a name in it")
        case [module, name]:
            _import_spec(module, name)
        # Some Megatron scripts know the word "local". A patched Megatron knows the names of the entry points.
        case [word] if word != "local" and word not in _names_of_entry_points():
            raise UsageError(
                f"--spec {word} is not known: give --spec hgrn2 to a GPT, or --spec hgrn2_stack to a HybridModel"
            )


def _names_of_entry_points() -> set[str]:
    return importlib.metadata.entry_points(group="megatron.layer_specs").names


def _import_spec(module: str, name: str) -> None:
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError as error:
        if module in _names_of_entry_points():
            raise UsageError(f"--spec {module} takes no second word: drop {name}") from error
        raise UsageError(
            f"--spec {module} {name} cannot be imported: {error}. Correct the name of the module, or install it"
        ) from error
    if not found:
        raise UsageError(
            f"--spec {module} {name} is wrong, because the module {module} has no {name}: correct the second word"
        )


def launch(argv: list[str]) -> None:
    """Run `argv[0]` as a script, with the rest of `argv` as its command line, after Megatron has learned of HGRN2.

    Raises:
        UsageError: the script is not a file, it builds a model that cannot have HGRN2 layers, or its `--spec` is wrong.
    """
    script = argv[0]
    if not os.path.isfile(script):
        raise UsageError(f"{script} is not a file: give the path of a Megatron script\n{USAGE}")
    # Python itself puts a script's folder first, so that the script imports the megatron of its own checkout.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))

    from hgrn2_megatron import cpu

    # This comes before the first import of Megatron, which decides at import whether to compile.
    cpu.install()
    from hgrn2_megatron import arguments, megatron_hooks

    sys.argv = argv
    spec = arguments.spec_of(argv[1:])
    check_spec(spec)
    if spec and arguments.is_hgrn2_spec(spec) and os.path.basename(script) in OTHER_MODELS:
        raise UsageError(
            f"--spec {spec[0]} is for a GPT or a HybridModel, and {script} builds another model: run "
            "pretrain_hybrid.py or pretrain_gpt.py"
        )
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
        # in one call, so that the lines of several ranks do not mix
        sys.stderr.write(f"hgrn2_megatron: error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
