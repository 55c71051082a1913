"""Whether the tokens that an engine took are the likeliest by the forward of the whole sequence."""

import harness
import torch
from torch import Tensor


def build(tp: int, settings: dict):
    """A model of `settings`, and one in fp32 with the same weights.

    The settings are those of `harness.build_model`, "bf16": true, and "few", the number of tokens that are likely.
    """
    settings = dict(settings)
    dtype = torch.bfloat16 if settings.pop("bf16", False) else torch.float32
    few = settings.pop("few", None)
    exact = harness.build_model(tp, **settings).eval()
    weights = {name: w.to(dtype) for name, w in harness.full_weights(exact).items()}
    if few:
        # each rank has some rows of it
        weights["output_layer.weight"][: few // tp] *= 10
    exact.load_state_dict(weights, strict=False)
    model = harness.build_model(tp, **settings, bf16=dtype == torch.bfloat16, params_dtype=dtype).to(dtype).eval()
    model.load_state_dict(weights, strict=False)
    return model.to("cuda"), exact.to("cuda")


@torch.inference_mode()
def whole(model, tokens: Tensor) -> Tensor:
    """Logits [T, vocabulary] in fp32 of tokens [T]."""
    # sequence parallelism wants a multiple of TP
    padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % model.config.tensor_model_parallel_size))
    positions = torch.arange(len(padded), device="cuda")[None]
    return model(padded[None], positions, None, runtime_gather_output=True)[0, : len(tokens)].float()


def judge(model, exact, tokens: list[int], start: int) -> Tensor:
    """Counts (right, ties, all) of the tokens from `start` on.

    A tie is another token than the likeliest where fp32 tells the two apart by less than twice what rounding to the
    model's dtype does to a logit of this sequence, so that neither is wrong; there are none in fp32.
    """
    tokens = torch.tensor(tokens, device="cuda")
    taken = tokens[start:, None]
    logits, fp32 = (whole(x, tokens)[start - 1 : -1] for x in (model, exact))
    right = logits.argmax(-1, keepdim=True) == taken
    error = (logits - fp32).abs().max()
    gaps = fp32.max(-1, keepdim=True).values - fp32.gather(-1, taken)
    ties = ~right & (gaps <= 2 * error)
    return torch.tensor([right.sum(), ties.sum(), right.numel()])


def count_graphs(model) -> int:
    """CUDA graphs that Megatron has captured of the model, its block or its layers."""
    from megatron.core.transformer.cuda_graphs import CudaGraphManager

    return sum(len(x.cudagraph_runners) for x in model.modules() if isinstance(x, CudaGraphManager))


def describe(counts: Tensor) -> str:
    right, ties, number = counts.tolist()
    return f"{right} of {number} right" + (f", {ties} ties" if ties else "")
