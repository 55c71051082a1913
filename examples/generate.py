"""Continue a prompt with a byte-level checkpoint, such as the quickstart's.

    torchrun --nproc_per_node 1 -m hgrn2_megatron examples/generate.py \\
        --load quickstart/checkpoints --use-checkpoint-args --prompt "def "

The text goes to stdout as it comes, what Megatron says and the speed to stderr. The prompt goes through the model at
once, then each byte by itself: an HGRN2 layer keeps a state whose size does not depend on the length, an attention
layer of a hybrid the keys and values of all tokens. The same seed gives the same text.
"""

import argparse
import codecs
import contextlib
import logging
import sys
import time

import torch
from megatron.core import mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.checkpointing import checkpoint_exists, load_checkpoint
from megatron.training.initialize import initialize_megatron
from prepare_bytes import END_OF_DOCUMENT, VOCAB_SIZE
from pretrain_gpt import use_prebuilt_dataset_helpers

# what Megatron wants to know of a run that does not train; its own flags win
DEFAULTS = {
    "tokenizer_type": "NullTokenizer",
    "vocab_size": VOCAB_SIZE,
    "micro_batch_size": 1,
    "no_load_optim": True,
    "no_load_rng": True,
}


def add_generate_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("generate")
    group.add_argument("--prompt", default="", help="text to continue; the start of a document when empty")
    group.add_argument("--max-new-tokens", type=int, default=200, help="bytes to add at most")
    group.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    group.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest bytes, 0 for all")
    return parser


def check(args: argparse.Namespace):
    """Refuse what cannot be sampled.

    Raises:
        ValueError: naming the flag to change.
    """
    if args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1 or args.sequence_parallel:
        raise ValueError("generation knows tensor parallelism only: drop --sequence-parallel and the others")
    if args.temperature < 0 or args.top_k < 0 or args.max_new_tokens < 0:
        raise ValueError("--temperature, --top-k and --max-new-tokens must not be negative")
    needed = len(args.prompt.encode()) + args.max_new_tokens
    if args.position_embedding_type == "learned_absolute" and needed > args.max_position_embeddings:
        raise ValueError(
            f"prompt and --max-new-tokens make {needed} positions, but the model has learned "
            f"{args.max_position_embeddings}: ask for fewer"
        )


@contextlib.contextmanager
def stdout_for_the_result():
    """Send what Megatron says meanwhile to stderr."""
    for handler in logging.getLogger().handlers:
        handler.setStream(sys.stderr)  # Megatron's writes to the stdout it met at import
    with contextlib.redirect_stdout(sys.stderr):
        yield


def load_model() -> torch.nn.Module:
    """The model of Megatron's args with the weights of --load, ready to evaluate."""
    args = get_args()
    # or Megatron would go on with random weights
    args.exit_on_missing_checkpoint = True
    config = gpt_config_from_args(args)
    models = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_checkpoint(models, None, None)
    return models[0].eval()


def next_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one token.

    Args:
        logits: [vocabulary] of the last position; the padding of the vocabulary is cut off.
        temperature: logits are divided by it; 0 takes the likeliest.
        top_k: number of candidates, 0 for all.
        generator: on the CPU, equal on all ranks, so that they agree.
    """
    logits = logits[:VOCAB_SIZE].float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, VOCAB_SIZE)).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


@torch.inference_mode()
def generate(model: torch.nn.Module, args: argparse.Namespace, new: list[int], context, times: list[float]):
    """Yield tokens after `new`, until the end of the document or `args.max_new_tokens`.

    Args:
        new: the prompt's tokens.
        context: a StaticInferenceContext for one sequence, which the layers fill.
        times: takes when it starts, and when each token is drawn.
    """
    generator = torch.Generator().manual_seed(args.seed)
    times.append(time.perf_counter())
    for _ in range(args.max_new_tokens):
        start = context.sequence_len_offset
        positions = torch.arange(start, start + len(new), device="cuda")[None]
        batch = torch.tensor([new], device="cuda")
        logits = model(batch, positions, None, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset += len(new)
        token = next_token(logits[0, -1], args.temperature, args.top_k, generator)
        times.append(time.perf_counter())
        if token == END_OF_DOCUMENT:
            return
        new = [token]
        yield token


def report(prompt: int, times: list[float], context: StaticInferenceContext):
    """Say what was cached, and how fast: the first step takes the prompt, each other one token."""
    bytes_kept = sum(x.nbytes for kept in context.key_value_memory_dict.values() for x in kept)
    print(f"{bytes_kept:,} bytes of states, keys and values", file=sys.stderr)
    if len(times) > 2:
        first, rest = times[1] - times[0], times[-1] - times[1]
        speeds = f"prompt {prompt / first:,.1f} tokens/s, then {(len(times) - 2) / rest:,.1f} tokens/s"
        print(speeds, file=sys.stderr)


def main():
    with stdout_for_the_result():
        use_prebuilt_dataset_helpers()
        load = parse_args(add_generate_arguments).load
        if load is None or not checkpoint_exists(load):
            raise ValueError(f"--load {load}: no checkpoint there; give the folder that --save named in training")
        args = parse_and_validate_args(add_generate_arguments, args_defaults=DEFAULTS)
        check(args)
        initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
        model = load_model()
    speaks = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0
    # a byte may be part of a character only
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    prompt = list(args.prompt.encode()) or [END_OF_DOCUMENT]
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + args.max_new_tokens)
    times: list[float] = []
    with contextlib.nullcontext() if speaks else contextlib.redirect_stdout(None):
        print(args.prompt, end="", flush=True)
        for token in generate(model, args, prompt, context, times):
            print(decoder.decode(bytes([token])), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)
    if speaks:
        report(len(prompt), times, context)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
