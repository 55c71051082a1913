"""Build the models whose decoding generation.py and engine.py measure, in one process."""
# ruff: noqa: E402

import dataclasses
import gc

import torch

from hgrn2_megatron import cpu

cpu.install()

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from hgrn2_megatron.arguments import BLOCK, HGRN2TransformerConfig
from hgrn2_megatron.spec import hgrn2_stack

ON_GPU = torch.cuda.is_available()
WITH_TE = HAVE_TE and ON_GPU
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of the sequences that it decodes.

    Attributes:
        layers: number of layers of a GPT, each with a mixer and a channel mixer.
        hidden, ffn: channels of a layer, and of its channel mixer.
        head: channels of a head.
        vocab: number of tokens in the vocabulary.
        batch: number of sequences that are decoded together.
        contexts: lengths in tokens at which a step is timed.
        prompt: length of the timed prompt in tokens.
        cap: the largest batch to try.
        checked: length in tokens of the prompt of the check that compares greedy tokens.
    """

    layers: int = 24
    hidden: int = 2048
    head: int = 128
    ffn: int = 5632
    vocab: int = 32000
    batch: int = 4
    contexts: tuple[int, ...] = (1024, 65536)
    prompt: int = 8192
    cap: int = 8192
    checked: int = 64


TINY = Sizes(2, 64, 16, 128, 64, batch=2, contexts=(16, 48), prompt=32, cap=8, checked=16)


def start(backend: str = "gloo"):
    """Start Megatron in one process, without torchrun. With gloo no thread of NCCL disturbs the capture of a graph."""
    if ON_GPU:
        torch.cuda.set_device(0)
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)


def build(kind: str, sizes: Sizes, steps: int, **more) -> LanguageModule:
    """Return a model in evaluation mode.

    Args:
        kind: "HGRN2" for a HybridModel of HGRN2 layers and MLPs, or "attention" for a GPT.
        sizes: sizes of the model.
        steps: number of tokens that it decodes after the longest context.
        more: other fields of its config.
    """
    settings = dict(
        **BLOCK,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.hidden // sizes.head,
        bf16=ON_GPU,
        params_dtype=DTYPE,
        transformer_impl="transformer_engine" if WITH_TE else "local",
        use_cpu_initialization=not ON_GPU,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=WITH_TE,
        persist_layer_norm=False,
        **more,
    )
    shape = dict(vocab_size=sizes.vocab, max_sequence_length=max(sizes.contexts) + steps)
    model: LanguageModule
    if kind == "HGRN2":
        stack = dict(num_layers=2 * sizes.layers, is_hybrid_model=True, hgrn2_expand_ratio=sizes.head)
        model = HybridModel(
            config=HGRN2TransformerConfig(**settings, **stack),
            hybrid_stack_spec=hgrn2_stack,
            hybrid_layer_pattern="M-" * sizes.layers,
            position_embedding_type="none",
            **shape,
        )
    else:
        te, local = get_gpt_layer_with_transformer_engine_spec, get_gpt_layer_local_spec
        model = GPTModel(
            config=TransformerConfig(**settings, num_layers=sizes.layers),
            transformer_layer_spec=te() if WITH_TE else local(normalization="RMSNorm"),
            position_embedding_type="rope",
            **shape,
        )
    return model.to("cuda", DTYPE).eval()


def synchronize():
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def release():
    """Free the GPU memory that nothing refers to any more."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
