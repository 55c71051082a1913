"""Greedy decoding of a model in Megatron's static context, in several ways, and a check of the decoded tokens."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch
from decoded_model import DTYPE, ON_GPU, WITH_TE, Sizes
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

# number of decoding steps in a pass
STEPS = 8
# largest allowed relative difference between the logits of single steps and the logits of the whole sequence
ERROR = 0.1 if ON_GPU else 1e-4


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run the steps of a model.

    Attributes:
        name: name in the tables.
        graph: whether a step is also captured in a CUDA graph.
        unfused: whether Transformer Engine's unfused attention is used.
        rope: whether keys and queries are rotated.
    """

    name: str
    graph: bool = False
    unfused: bool = False
    rope: bool = True


UNFUSED = "attention, unfused" if WITH_TE else "attention"
MODELS = {
    "HGRN2": [Way("HGRN2", graph=True)],
    "attention": [
        Way(UNFUSED, unfused=True),
        Way(f"{UNFUSED}, no RoPE", unfused=True, rope=False),
        *([Way("attention")] if WITH_TE else []),
    ],
}


@contextlib.contextmanager
def applied(way: Way, model: GPTModel) -> Iterator[None]:
    """Run the model this way inside the `with` block."""
    names = ("NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN")
    before, positions = {name: os.environ.get(name) for name in names}, model.position_embedding_type
    if way.unfused:
        os.environ.update(dict.fromkeys(names, "0"))
    if not way.rope:
        model.position_embedding_type = "none"
    _forget_backend()
    try:
        yield
    finally:
        model.position_embedding_type = positions
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_backend()


def _forget_backend():
    """Make Transformer Engine read the environment again.

    It does so by itself only if the shapes of attention change.
    """
    if WITH_TE:
        from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

        _attention_backends["backend_selection_requires_update"] = True


def backend(way: Way) -> str:
    """Return the name of the attention that ran last, or "" for a model without attention."""
    if way.name == "HGRN2":
        return ""
    if not WITH_TE:
        return "Megatron's own attention"
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

    return ", ".join(x for x in ("flash", "fused", "unfused") if chosen[f"use_{x}_attention"])


def forward(model: GPTModel, tokens: Tensor, context: StaticInferenceContext | None = None) -> Tensor:
    """Return logits [b, s, vocabulary] of tokens [b, s].

    With a context, it returns the logits of the last token only, and moves the context on by s tokens.
    """
    # the models read neither an attention mask nor position ids
    logits = model(tokens, None, None, inference_context=context, runtime_gather_output=True)
    if context:
        context.sequence_len_offset += tokens.shape[1]
    return logits


class Decoder:
    """A greedy decoder that continues from a filled context."""

    def __init__(self, model: GPTModel, context: StaticInferenceContext, tokens: Tensor):
        self.model, self.context, self.tokens = model, context, tokens
        context.enable_decode_mode()

    def step(self) -> Tensor:
        """Return logits [b, vocabulary] after `self.tokens`, and replace `self.tokens` by the likeliest next tokens."""
        logits = forward(self.model, self.tokens, self.context)[:, -1]
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def capture(self) -> Callable[[], Tensor]:
        """Capture the step in a CUDA graph, and return a function that replays it.

        Capturing runs the step several times, and each run advances the states of the context.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self.step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def judge(name: str, stepped: Tensor, whole: Tensor):
    """Compare the logits [b, n, vocabulary] of steps and of the whole sequence. Stop the program if they disagree."""
    chosen = stepped.argmax(-1, keepdim=True)
    best = whole.max(-1, keepdim=True)
    gaps = (best.values - whole.gather(-1, chosen)).float().squeeze(-1)
    other = (chosen != best.indices).squeeze(-1)
    agree = ~other | (gaps <= 2 * torch.finfo(DTYPE).eps * best.values.float().abs().squeeze(-1))
    error = ((stepped - whole).float().norm() / whole.float().norm()).item()
    where = f", logit gaps of the others {[round(x, 4) for x in gaps[other].tolist()]}" if other.any() else ""
    print(
        f"{name}: {int((~other).sum())} of {other.numel()} greedy tokens equal, with ties {int(agree.sum())}; "
        f"logits differ by {error:.1e} of their norm{where}",
        flush=True,
    )
    # an error that is not finite must fail too
    if not (agree.float().mean() >= 0.75 and error < ERROR):
        raise SystemExit(
            f"{name}: decoded tokens do not agree with the forward of the whole sequence, so nothing is timed"
        )


def check(model: GPTModel, way: Way, sizes: Sizes) -> Way:
    """Decode a few tokens and compare them with the forward of the whole sequence.

    Returns:
        `way`, or a copy of it without a graph if no graph can be captured.

    Raises:
        SystemExit: the tokens or the logits disagree.
    """
    prompt = torch.randint(sizes.vocab, (2, sizes.checked), device="cuda")
    context = StaticInferenceContext(2, sizes.checked + STEPS)
    first = forward(model, prompt, context)
    decoder = Decoder(model, context, first[:, -1].argmax(-1, keepdim=True))
    states = [x.clone() for kept in context.key_value_memory_dict.values() for x in kept]
    fed, stepped = [], [first[:, -1]]
    for _ in range(STEPS):
        fed.append(decoder.tokens.clone())
        stepped.append(decoder.step())
    whole = forward(model, torch.cat([prompt, *fed], 1))[:, sizes.checked - 1 :]
    judge(way.name, torch.stack(stepped, 1), whole)
    if not (way.graph and ON_GPU):
        return way
    try:
        replay = decoder.capture()
    except RuntimeError as error:
        print(f"{way.name}: no CUDA graph: {error}", flush=True)
        return dataclasses.replace(way, graph=False)
    kept = (x for pair in context.key_value_memory_dict.values() for x in pair)
    for x, state in zip(kept, states, strict=True):
        x.copy_(state)
    stepped = [first[:, -1]]
    for token in fed:
        decoder.tokens.copy_(token)
        stepped.append(replay().clone())
    judge(f"{way.name}, CUDA graph", torch.stack(stepped, 1), whole)
    return way
