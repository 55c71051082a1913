"""Time a decoding step of a pure HGRN2 model in Megatron's dynamic engine, by length, with and without CUDA graphs.

    python benchmarks/engine.py [--tiny] [--out FILE.json]

The model is the HybridModel of generation.py. The engine gets a batch of requests with prompts of the given length, and
computes the prompts in pieces. Then each step makes one token of every request. A step includes Megatron's scheduling
and sampling. The time is the median of the steps after the first few. The graphs are Megatron's own (`cuda_graph_impl`
local): one per layer, or one of all layers, a scope that Megatron calls "block". The benchmark also prints how many
greedy tokens equal those of the run without a graph, up to the first difference. In bf16 a tie between two tokens can
cause a difference.
"""

import argparse
import dataclasses
import statistics
import time

import report
import torch
from decoded_model import ON_GPU, TINY, Sizes, build, release, start, synchronize
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

# Timed tokens per request, and tokens before them. The first requests decode while the last prompts are computed.
STEPS, WARM = 128, 8
# name of a row -> settings of the model's config
WAYS = {"no graph": {}}
if ON_GPU:
    for scope in ("layer", "block"):
        WAYS[f"graph of each {scope}"] = dict(cuda_graph_impl="local", inference_cuda_graph_scope=scope)


class Tokens:
    """A tokenizer for prompts that are already tokens."""

    bos = None

    def __init__(self, vocab: int):
        self.vocab_size, self.eod = vocab, vocab - 1

    def detokenize(self, tokens, **ignored):
        return ""


def engine_of(model, sizes: Sizes, length: int) -> DynamicInferenceEngine:
    """Return an engine for `sizes.batch` requests with prompts of this length in tokens."""
    states = MambaInferenceStateConfig.from_model(model)
    numbers = sizes.layers * torch.Size(states.ssm_states_shape).numel()
    block = 256 if ON_GPU else 16
    # Megatron's context needs an attention layer, so its keys and values get memory too
    tokens = sizes.batch * (length + STEPS + WARM + 2 * block)
    caches = 2 * sizes.hidden * model.config.params_dtype.itemsize * tokens
    settings = InferenceConfig(
        max_sequence_length=length + STEPS + WARM + 1,
        max_requests=sizes.batch,
        # Megatron pads to a multiple of 64
        max_tokens=max(sizes.prompt, 64),
        block_size_tokens=block,
        buffer_size_gb=(4 * sizes.batch * numbers + 2 * caches) / 2**30,
        mamba_inference_state_config=states,
        enable_chunked_prefill=True,
        unified_memory_level=0,
        # one graph for the whole batch; prompts run without a graph
        num_cuda_graphs=1,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    context = DynamicInferenceContext(model_config=model.config, inference_config=settings)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Tokens(sizes.vocab))
    return DynamicInferenceEngine(controller, context)


def measure(engine: DynamicInferenceEngine, sizes: Sizes, length: int) -> tuple[float, float, list[list[int]]]:
    """Decode the requests. Return seconds of the prompts, seconds of the median step, and each request's tokens."""
    prompts = torch.randint(sizes.vocab, (sizes.batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = SamplingParams(num_tokens_to_generate=WARM + STEPS, top_k=1, termination_id=-1)
    for number, prompt in enumerate(prompts):
        engine.add_request(number, prompt, sampling)
    prefill, decoding, finished = 0.0, [], {}
    while len(finished) < sizes.batch:
        # a full batch: every prompt is computed, and no request has finished
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
    """Return the number of equal tokens before the first difference. After it the two texts are not comparable."""
    return next((i for i, (x, y) in enumerate(zip(tokens, others, strict=True)) if x != y), len(tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="run a toy model")
    report.add_option(parser)
    args = parser.parse_args()
    sizes = TINY if args.tiny else Sizes()
    start("nccl" if ON_GPU else "gloo")
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(
        f"{device}: {sizes}\n\n| way | context | prompts s | ms per step | tokens/s |\n|---|---|---|---|---|",
        flush=True,
    )
    expected, rows = {}, []
    for way, settings in WAYS.items():
        for length in sizes.contexts:
            # a model's graphs belong to one engine
            torch.manual_seed(0)
            model = build("HGRN2", sizes, WARM + STEPS, **settings)
            engine = engine_of(model, sizes, length)
            prefill, step, tokens = measure(engine, sizes, length)
            print(f"| {way} | {length} | {prefill:.2f} | {step * 1000:.2f} | {sizes.batch / step:,.0f} |", flush=True)
            row = {"way": way, "context": length, "prompts s": round(prefill, 2), "ms per step": round(step * 1000, 2)}
            rows.append(row | {"tokens/s": round(sizes.batch / step)})
            without = expected.setdefault(length, tokens)
            equal = [in_common(*pair) for pair in zip(tokens, without, strict=True)]
            print(f"  the first {equal} of {WARM + STEPS} tokens are the same as without a graph", flush=True)
            del engine, model
            release()
            report.write(args.out, rows, sizes=dataclasses.asdict(sizes))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
