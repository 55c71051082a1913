"""Run lm-evaluation-harness on a model that `convert` exported.

    python examples/evaluate_exported.py --model_args pretrained=<folder>,dtype=float32 \\
        --tasks my_task --include_path my_tasks --batch_size 16

The script needs `pip install 'lm-eval[hf]'`, and takes the flags of `lm_eval run`. It runs `lm_eval run --model hf`
after registering the model type hgrn2 with transformers, so hgrn2_kernels.hf computes the model, on a GPU or a CPU.

With `--fla` as the first flag, flash-linear-attention (fla) computes the model instead, which needs
`pip install flash-linear-attention`. Without a GPU, fla's kernels run in Triton's interpreter. That takes minutes for a
small model in fp32, and far too long for others.
"""

import os
import sys

import torch


def interpret():
    """Make Triton run kernels in its interpreter, on the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    init = Autotuner.__init__

    def without_choice(self, fn, arg_names, configs, *args, **kwargs):
        # keep one configuration, because only a GPU could time several
        init(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = without_choice


def main():
    flags, device = sys.argv[1:], "cuda" if torch.cuda.is_available() else "cpu"
    with_fla = flags[:1] == ["--fla"]
    if with_fla and device == "cpu":
        interpret()
    try:
        from lm_eval.__main__ import cli_evaluate

        if with_fla:
            # importing it registers its classes
            import fla  # noqa: F401
        else:
            from hgrn2_kernels import hf

            hf.register(exist_ok=True)
    except ImportError as error:
        sys.exit(f"a package is missing: pip install 'lm-eval[hf]', and flash-linear-attention for --fla ({error})")
    sys.argv = ["lm_eval", "run", "--model", "hf", "--device", device, *flags[with_fla:]]
    cli_evaluate()


if __name__ == "__main__":
    main()
