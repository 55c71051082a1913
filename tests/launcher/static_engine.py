"""Megatron's static engine on a small model: prints, of each prompt, how many greedy tokens are right.

[torchrun ...] static_engine.py TP ENGINE TOKENS SETTINGS

ENGINE is legacy, or dynamic for Megatron's dynamic one underneath; SETTINGS is what `greedy.build` takes, as JSON.
"""

import json
import sys

import greedy
import harness

# Megatron wants a multiple of TP
PROMPTS = ["1 2 3", "4 5 6 7 8 9", "7", "8 8"]


class Numbers:
    """A tokenizer whose words are the tokens' numbers."""

    # no token ends a text
    vocab_size, eod, bos = harness.VOCAB, -1, None

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, tokens, **ignored):
        return " ".join(map(str, tokens))


def main(tp: int, legacy: bool, num_tokens: int, settings: dict):
    harness.start_megatron(tp, cpu_mode=True)
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    model, exact = greedy.build(tp, settings)
    wrapped = GPTInferenceWrapper(model, StaticInferenceContext(len(PROMPTS), num_tokens + 40))
    controller = TextGenerationController(wrapped, Numbers())
    engine = StaticInferenceEngine(controller, max_batch_size=len(PROMPTS), legacy=legacy, buffer_size_gb=0.01)
    # it would go on as the legacy one if the other could not be made
    assert engine.legacy == legacy
    sampling = SamplingParams(num_tokens_to_generate=num_tokens, top_k=1, termination_id=-1)
    requests = engine.generate(PROMPTS, sampling_params=sampling)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        given = Numbers().tokenize(prompt)
        print(greedy.describe(greedy.judge(model, exact, [*given, *request.generated_tokens], len(given))))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "legacy", int(sys.argv[3]), json.loads(sys.argv[4]))
