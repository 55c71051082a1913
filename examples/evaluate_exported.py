"""lm-evaluation-harness on a model that `convert` exported, computed by fla.

    python examples/evaluate_exported.py --model_args pretrained=<folder>,dtype=float32 \\
        --tasks my_task --include_path my_tasks --batch_size 16

The flags are those of `lm_eval run`. Needs `pip install 'lm-eval[hf]' flash-linear-attention`. It is `lm_eval run
--model hf` with fla imported, which tells transformers what a hgrn2 is. Without a GPU fla's kernels run under Triton's
interpreter: minutes for a small model in fp32, and for nothing larger.
"""

import os
import sys

import torch


def interpret():
    """Let Triton's kernels run on the CPU, slowly."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    init = Autotuner.__init__

    def without_choice(self, fn, arg_names, configs, *args, **kwargs):
        # to time several would take a GPU
        init(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = without_choice


def main():
    device = "cuda"
    if not torch.cuda.is_available():
        device = "cpu"
        interpret()
    try:
        import fla  # noqa: F401
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"pip install 'lm-eval[hf]' flash-linear-attention ({error})")
    sys.argv = ["lm_eval", "run", "--model", "hf", "--device", device, *sys.argv[1:]]
    cli_evaluate()


if __name__ == "__main__":
    main()
