"""Continue a prompt with a checkpoint that was trained on bytes, such as the quickstart's.

    torchrun --nproc_per_node 1 -m hgrn2_megatron examples/generate.py \\
        --load quickstart/checkpoints --use-checkpoint-args --prompt "def "

The text goes to stdout byte by byte. Megatron's messages and the speed go to stderr. The model reads the prompt in one
pass, and then one byte per pass. An HGRN2 layer keeps a state whose size does not depend on the length of the text.
An attention layer of a hybrid keeps the keys and values of all tokens. The same seed gives the same text.
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
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.checkpointing import checkpoint_exists, load_checkpoint
from megatron.training.initialize import initialize_megatron
from prepare_bytes import END_OF_DOCUMENT, VOCAB_SIZE
from pretrain_gpt import use_prebuilt_dataset_helpers

# Megatron's defaults for a run that does not train; flags on the command line override them
DEFAULTS = {
    "tokenizer_type": "NullTokenizer",
    "vocab_size": VOCAB_SIZE,
    "micro_batch_size": 1,
    "no_load_optim": True,
    "no_load_rng": True,
}


def add_generate_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("generate")
    group.add_argument("--prompt", default="", help="text to continue; an empty prompt starts a document")
    group.add_argument("--max-new-tokens", type=int, default=200, help="largest number of bytes to generate")
    group.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0 takes the likeliest byte")
    group.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest bytes; 0 samples from all")
    return parser


def check(args: argparse.Namespace):
    """Check the flags of this script.

    Raises:
        ValueError: a flag is out of range or is not supported. The message names the flag to change.
    """
    if args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1 or args.sequence_parallel:
        raise ValueError(
            "generate.py supports no parallelism except tensor parallelism: drop --pipeline-model-parallel-size, "
            "--context-parallel-size and --sequence-parallel"
        )
    if args.temperature < 0 or args.top_k < 0 or args.max_new_tokens < 0:
        raise ValueError(
            f"--temperature {args.temperature}, --top-k {args.top_k} and --max-new-tokens {args.max_new_tokens}: "
            "none of them may be negative"
        )
    needed = len(args.prompt.encode()) + args.max_new_tokens
    if args.position_embedding_type == "learned_absolute" and needed > args.max_position_embeddings:
        raise ValueError(
            f"the prompt and --max-new-tokens need {needed} positions, but the model has learned "
            f"{args.max_position_embeddings}: give a smaller --max-new-tokens or a shorter prompt"
        )


@contextlib.contextmanager
def stdout_for_the_result():
    """Send everything that Megatron prints inside this context to stderr."""
    for handler in logging.getLogger().handlers:
        handler.setStream(sys.stderr)  # Megatron's handler keeps the stdout that it found at import
    with contextlib.redirect_stdout(sys.stderr):
        yield


def load_model() -> torch.nn.Module:
    """Return the model that Megatron's args describe, with the weights of --load, in evaluation mode.

    It is a HybridModel if the args have a hybrid layer pattern, from the checkpoint or from the command line, and
    otherwise a GPT.
    """
    args = get_args()
    # without this, Megatron would continue with random weights
    args.exit_on_missing_checkpoint = True
    config = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    models = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_checkpoint(models, None, None)
    return models[0].eval()


def next_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one token.

    Args:
        logits: [vocabulary], the logits of the last position. The padding of the vocabulary is cut off here.
        temperature: the logits are divided by it. 0 takes the likeliest token.
        top_k: number of candidates; 0 takes all tokens.
        generator: a generator on the CPU. It must be in the same state on all ranks, so that they draw the same token.
    """
    logits = logits[:VOCAB_SIZE].float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, VOCAB_SIZE)).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


@torch.inference_mode()
def generate(model: torch.nn.Module, args: argparse.Namespace, new: list[int], context, times: list[float]):
    """Yield the tokens that follow `new`, until the document ends or `args.max_new_tokens` are drawn.

    Args:
        model: the model of `load_model`.
        args: Megatron's args.
        new: the prompt's tokens.
        context: a StaticInferenceContext for one sequence. The layers keep their states in it.
        times: list that receives the time of the start and then of each drawn token, in seconds.
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
    """Print the size of the cache and the speed. The first step reads the prompt, each later step reads one token."""
    bytes_kept = sum(x.nbytes for kept in context.key_value_memory_dict.values() for x in kept)
    print(f"{bytes_kept:,} bytes of states, keys and values are cached", file=sys.stderr)
    if len(times) > 2:
        first, rest = times[1] - times[0], times[-1] - times[1]
        speeds = f"prompt {prompt / first:,.1f} tokens/s, then {(len(times) - 2) / rest:,.1f} tokens/s"
        print(speeds, file=sys.stderr)


def main():
    with stdout_for_the_result():
        use_prebuilt_dataset_helpers()
        load = parse_args(add_generate_arguments).load
        if load is None or not checkpoint_exists(load):
            raise ValueError(f"--load {load}: found no checkpoint there; give the folder that --save named in training")
        args = parse_and_validate_args(add_generate_arguments, args_defaults=DEFAULTS)
        check(args)
        initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
        model = load_model()
    speaks = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0
    # a byte may be only a part of a character
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
