"""Decoding in Megatron's dynamic engine: time a step of a pure HGRN2 model, by length, with CUDA graphs and without.

    python benchmarks/engine.py [--tiny]

The model of generation.py. A batch of requests comes with prompts of the length, which go through in pieces; then each
step, which Megatron schedules, runs and samples from, is one token of every request. The median of those after the
first few counts. Graphs are Megatron's own, `cuda_graph_impl` local: one of each layer, or one of the block. How many
greedy tokens are those without a graph is printed: ties of bf16 end it.
"""

import argparse
import statistics
import time

import torch
from decoded_model import ON_GPU, TINY, Sizes, build, release, start, synchronize
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

# the first requests decode while the last prompts go through
STEPS, WARM = 128, 8
# name -> what the config gets
WAYS = {"no graph": {}}
if ON_GPU:
    for scope in ("layer", "block"):
        WAYS[f"graph of each {scope}"] = dict(cuda_graph_impl="local", inference_cuda_graph_scope=scope)


class Tokens:
    """A tokenizer for prompts that are tokens."""

    bos = None

    def __init__(self, vocab: int):
        self.vocab_size, self.eod = vocab, vocab - 1

    def detokenize(self, tokens, **ignored):
        return ""


def engine_of(model, sizes: Sizes, length: int) -> DynamicInferenceEngine:
    """An engine for `sizes.batch` requests of this length."""
    states = MambaInferenceStateConfig.from_model(model)
    numbers = sizes.layers * torch.Size(states.ssm_states_shape).numel()
    block = 256 if ON_GPU else 16
    # keys and values of the one attention layer that Megatron must see
    tokens = sizes.batch * (length + STEPS + WARM + 2 * block)
    caches = 2 * sizes.hidden * model.config.params_dtype.itemsize * tokens
    settings = InferenceConfig(
        max_sequence_length=length + STEPS + WARM + 1,
        max_requests=sizes.batch,
        # Megatron pads to 64
        max_tokens=max(sizes.prompt, 64),
        block_size_tokens=block,
        buffer_size_gb=(4 * sizes.batch * numbers + 2 * caches) / 2**30,
        mamba_inference_state_config=states,
        enable_chunked_prefill=True,
        unified_memory_level=0,
        # one, of the whole batch; prompts go without
        num_cuda_graphs=1,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    context = DynamicInferenceContext(model_config=model.config, inference_config=settings)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Tokens(sizes.vocab))
    return DynamicInferenceEngine(controller, context)


def measure(engine: DynamicInferenceEngine, sizes: Sizes, length: int) -> tuple[float, float, list[list[int]]]:
    """Seconds of the prompts, seconds of the median step of the whole batch, and the tokens of each request."""
    prompts = torch.randint(sizes.vocab, (sizes.batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingParams(num_tokens_to_generate=WARM + STEPS, top_k=1, termination_id=-1)
    for number, prompt in enumerate(prompts):
        engine.add_request(number, prompt, sampling)
    prefill, decoding, finished = 0.0, [], {}
    while len(finished) < sizes.batch:
        # then every prompt is through, and none has finished
        full = engine.context.total_request_count == sizes.batch
        synchronize()
        begin = time.perf_counter()
        records = engine.step_modern()["finished_request_records"]
        synchronize()
        seconds = time.perf_counter() - begin
        if full:
            decoding.append(seconds)
        elif not decoding:
            prefill += seconds
        for record in records:
            request = record.merge()
            finished[request.request_id] = list(request.generated_tokens)
    tokens = [finished[number] for number in sorted(finished)]
    return prefill, statistics.median(decoding[WARM:]), tokens


def in_common(tokens: list[int], others: list[int]) -> int:
    """How many tokens are the same before the first that is not; after another token the rest is another text."""
    return next((i for i, (x, y) in enumerate(zip(tokens, others, strict=True)) if x != y), len(tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    sizes = TINY if parser.parse_args().tiny else Sizes()
    start("nccl" if ON_GPU else "gloo")
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(
        f"{device}: {sizes}\n\n| way | context | prompts, s | ms a step | tokens/s |\n|---|---|---|---|---|", flush=True
    )
    expected = {}
    for way, settings in WAYS.items():
        for length in sizes.contexts:
            # its graphs are of one engine
            torch.manual_seed(0)
            model = build("HGRN2", sizes, WARM + STEPS, **settings)
            engine = engine_of(model, sizes, length)
            prefill, step, tokens = measure(engine, sizes, length)
            print(f"| {way} | {length} | {prefill:.2f} | {step * 1000:.2f} | {sizes.batch / step:,.0f} |", flush=True)
            without = expected.setdefault(length, tokens)
            equal = [in_common(*pair) for pair in zip(tokens, without, strict=True)]
            print(f"  as without a graph: the first {equal} of {WARM + STEPS} tokens", flush=True)
            del engine, model
            release()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
