"""Run lm-evaluation-harness on a model that `convert` exported. flash-linear-attention (fla) computes the model.

    python examples/evaluate_exported.py --model_args pretrained=<folder>,dtype=float32 \\
        --tasks my_task --include_path my_tasks --batch_size 16

The script needs `pip install 'lm-eval[hf]' flash-linear-attention`, and takes the flags of `lm_eval run`. It runs
`lm_eval run --model hf` after importing fla, which registers the model type hgrn2 with transformers. Without a GPU,
fla's kernels run in Triton's interpreter. That takes minutes for a small model in fp32, and far too long for others.
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
    device = "cuda"
    if not torch.cuda.is_available():
        device = "cpu"
        interpret()
    try:
        import fla  # noqa: F401
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"a package is missing: pip install 'lm-eval[hf]' flash-linear-attention ({error})")
    sys.argv = ["lm_eval", "run", "--model", "hf", "--device", device, *sys.argv[1:]]
    cli_evaluate()


if __name__ == "__main__":
    main()
