"""Megatron's static engine on a small model in the CPU mode: prints, of each prompt, how many greedy tokens are right.

python static_engine.py LAYER_PATTERN [legacy]

Without `legacy` the engine is Megatron's dynamic one underneath.
"""

import sys

import harness
import torch

TOKENS = 40
PROMPTS = ["1 2 3", "4 5 6 7 8 9", "7"]


class Numbers:
    """A tokenizer whose words are the tokens' numbers."""

    vocab_size, eod, bos = harness.VOCAB, harness.VOCAB - 1, None

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, tokens, **ignored):
        return " ".join(map(str, tokens))


def main(pattern: str, legacy: bool):
    harness.start_megatron(cpu_mode=True)
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    model = harness.build_model(hgrn2_layer_pattern=pattern).eval()
    model.load_state_dict(harness.full_weights(model), strict=False)
    wrapped = GPTInferenceWrapper(model, StaticInferenceContext(len(PROMPTS), 80))
    controller = TextGenerationController(wrapped, Numbers())
    engine = StaticInferenceEngine(controller, max_batch_size=len(PROMPTS), legacy=legacy, buffer_size_gb=0.01)
    # it would go on as the legacy one if the other could not be made
    assert engine.legacy == legacy
    # no token ends a text
    sampling = SamplingParams(num_tokens_to_generate=TOKENS, top_k=1, termination_id=-1)
    requests = engine.generate(PROMPTS, sampling_params=sampling)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        start = len(prompt.split())
        tokens = torch.tensor([*Numbers().tokenize(prompt), *request.generated_tokens])[None]
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1])[None], None, runtime_gather_output=True)
        right = logits[0, start - 1 : -1].argmax(-1) == tokens[0, start:]
        print(f"{right.sum().item()} of {len(right)} right")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["legacy"])
