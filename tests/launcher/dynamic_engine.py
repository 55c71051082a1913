"""Megatron's dynamic engine on a small model: prints how many greedy tokens are right.

[torchrun ...] dynamic_engine.py TP PP SETTINGS

SETTINGS is what `greedy.build` takes, as JSON, and "engine", settings of Megatron's InferenceConfig. The requests come
while others decode and leave before others, there are more than the context holds at a time, longer prompts than a step
takes, and too few blocks for all, so that some are paused and some start anew. All prompts begin alike.
"""

import importlib.util
import json
import os
import sys

import torch

if not torch.cuda.is_available():
    # Megatron verifies drafts in Triton kernels. Triton reads this at its import.
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("flash_attn") is None:
    import reference_flash_attention

    reference_flash_attention.install()

import greedy
import harness

# the step at which each comes, the length of its prompt, the tokens it asks for
REQUESTS = [(0, 3, 40), (0, 17, 5), (2, 1, 30), (3, 63, 12), (3, 8, 1), (9, 2, 25), (20, 36, 9), (20, 52, 9)]
# the last tokens of each prompt, which no other has
NUM_OWN = 2
MAX_REQUESTS, MAX_TOKENS = 4, 64
BLOCK, NUM_BLOCKS, NUM_PAUSED = 16, 8, 2


class Tokens:
    """A tokenizer that Megatron wants to have, for prompts that are tokens."""

    vocab_size, eod, bos = harness.VOCAB, harness.VOCAB - 1, None

    def detokenize(self, tokens, **ignored):
        return ""


def build_engine(model, **engine):
    from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    states = MambaInferenceStateConfig.from_model(model)
    num_layers = states.layer_type_list.count("M")
    # bytes of the states of all layers, which are fp32, and of the convolution that Megatron must see
    state = num_layers * (4 * torch.Size(states.ssm_states_shape).numel() + model.config.params_dtype.itemsize)
    num_drafts = engine.get("num_speculative_tokens", 0)
    # one, and one after each new token where some of them are drafts
    per_request = 2 + num_drafts if num_drafts else 1
    # keys and values of the one attention layer that Megatron must see
    block = 2 * BLOCK * model.config.hidden_size // model.config.tensor_model_parallel_size
    block *= model.config.params_dtype.itemsize
    cached = 0
    if engine.get("enable_prefix_caching"):
        # states: as many as Megatron keeps of a step, and a few more
        cached = 3 * MAX_REQUESTS + 6
    settings = InferenceConfig(
        max_sequence_length=80,
        max_requests=MAX_REQUESTS,
        max_tokens=MAX_TOKENS,
        block_size_tokens=BLOCK,
        buffer_size_gb=(MAX_REQUESTS * per_request * state + NUM_BLOCKS * block) / 2**30,
        paused_buffer_size_gb=NUM_PAUSED * block / 2**30,
        mamba_inference_state_config=states,
        enable_chunked_prefill=True,
        unified_memory_level=0,
        # of every size, where the model's config asks for any
        num_cuda_graphs=-1,
        prefix_caching_mamba_gb=cached * state / 2**30 or None,
        **engine,
    )
    context = DynamicInferenceContext(model_config=model.config, inference_config=settings)
    return DynamicInferenceEngine(TextGenerationController(GPTInferenceWrapper(model, context), Tokens()), context)


def generate(engine) -> dict:
    """The finished requests by their number; says how often some were paused, and how often evicted."""
    from megatron.core.inference.sampling_params import SamplingParams

    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(harness.VOCAB, (80,), generator=generator)
    finished, paused, step, restored = {}, 0, 0, 0
    if cache := engine.context.mamba_slot_allocator:
        restore = cache.restore_to_live

        def counted(*args):
            nonlocal restored
            is_restored = restore(*args)
            restored += is_restored
            return is_restored

        cache.restore_to_live = counted
    while len(finished) < len(REQUESTS):
        for number, (arrival, length, asked) in enumerate(REQUESTS):
            if arrival == step:
                own = torch.randint(harness.VOCAB, (min(length, NUM_OWN),), generator=generator)
                prompt = torch.cat([shared[: length - len(own)], own]).tolist()
                # no token ends a text
                sampling = SamplingParams(num_tokens_to_generate=asked, top_k=1, termination_id=-1)
                engine.add_request(number, prompt, sampling)
        for record in engine.step_modern()["finished_request_records"]:
            request = record.merge()
            finished[request.request_id] = request
        paused += engine.context.paused_request_count > 0
        step += 1
    counts = f"{engine.evicted_request_count} evicted, {restored} states restored"
    # in one call, because ranks print at the same time
    print(f"some paused in {paused} steps, {counts}\n{step} steps\n", end="", flush=True)
    return finished


def stage_of(whole, pp: int, settings: dict):
    """This rank's pipeline stage of a model of which every rank has the whole, with its weights."""
    from megatron.core import parallel_state

    # the whole model belongs to the groups of one stage
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pp)
    rank, num_layers = parallel_state.get_pipeline_model_parallel_rank(), whole.config.num_layers // pp
    layout = dict(pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32)
    stage = harness.build_model(pre_process=rank == 0, post_process=rank == pp - 1, **layout, **settings)
    own = {f"decoder.layers.{rank * num_layers + i}.": f"decoder.layers.{i}." for i in range(num_layers)}
    weights = {name: w for name, w in whole.state_dict().items() if "decoder.layers." not in name}
    for name, w in whole.state_dict().items():
        weights |= {name.replace(theirs, ours): w for theirs, ours in own.items() if name.startswith(theirs)}
    missing, _ = stage.load_state_dict(weights, strict=False)
    assert not missing
    return stage.to("cuda").eval()


def main(tp: int, pp: int, settings: dict):
    harness.start_megatron(tp, cpu_mode=True)
    if not torch.cuda.is_available():
        from megatron.core.inference.contexts import dynamic_context

        # Megatron then stores keys and values in PyTorch.
        dynamic_context.triton_append_key_value_cache = None
    engine = settings.pop("engine", {})
    model, exact = greedy.build(tp, settings)
    served = stage_of(model, pp, settings) if pp > 1 else model
    counts = torch.zeros(3, dtype=torch.long)
    for number, request in generate(build_engine(served, **engine)).items():
        _, length, asked = REQUESTS[number]
        tokens = [*request.prompt_tokens.tolist(), *request.generated_tokens]
        assert len(tokens) == length + asked
        counts += greedy.judge(model, exact, tokens, length)
    print(f"{greedy.describe(counts)}, {greedy.count_graphs(served)} CUDA graphs\n", end="")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
