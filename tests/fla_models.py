"""Small HGRN2 models of fla, on a GPU or, without one, on the CPU in Triton's interpreter.

fla has no attention without flash-attn, which needs a GPU and 16 bits. A plain reference takes its place.
"""

import gc
import importlib.util
import sys

import harness
import reference_flash_attention
import torch

sys.path.append(str(harness.ROOT / "examples"))
import evaluate_exported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 61
if importlib.util.find_spec("fla") is None:
    raise ModuleNotFoundError("the tests of fla need fla: pip install flash-linear-attention==0.6.0")
# fla looks for flash-attn and decorates its kernels when it is imported
reference_flash_attention.install()
if DEVICE == "cpu":
    evaluate_exported.interpret()

from fla.models import HGRN2Config, HGRN2ForCausalLM  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

# Every kernel takes its first configuration. Timing all of them would take minutes on a GPU.
for found in gc.get_objects():
    if isinstance(found, Autotuner):
        found.configs = found.configs[:1]


def model(**settings) -> HGRN2ForCausalLM:
    """Return a model of fla with random weights that leave every linear regime, fp32.

    fla's chunk kernels do not run in the interpreter, so the default mode is fused_recurrent.
    """
    # Two of fla's fused parts refuse a CPU or take seconds there.
    plain = {"fuse_cross_entropy": False, "fuse_swiglu": False, "fuse_norm": False}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "expand_ratio": 16, "vocab_size": VOCAB}
    torch.manual_seed(0)
    made = HGRN2ForCausalLM(HGRN2Config(**plain | small | {"attn_mode": "fused_recurrent"} | settings))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif "conv1d" in name:
                p.copy_(torch.randn_like(p))
            else:
                # the lower bounds start as zeros
                p.copy_(torch.randn_like(p) * (1 if "lower_bounds" in name else 1.5 * p.shape[-1] ** -0.5))
    return made.to(DEVICE)
