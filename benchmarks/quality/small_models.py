"""Train several small models of Megatron's own code side by side on one GPU.

A step of a model is a CUDA graph on a stream of its own. So the host does not slow the training down, and the small
kernels of several models run at the same time. On a CPU the same steps run one after the other.
"""
# ruff: noqa: E402

import functools
import math
import os

import torch
import torch.nn.functional as F
from batches import ON_GPU, Batch, Shape
from kinds import Kind

# Megatron compiles a few functions for GPUs. That would take longer than the training.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from hgrn2_megatron import cpu

cpu.install()

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hgrn2_megatron.arguments import BLOCK, HGRN2TransformerConfig
from hgrn2_megatron.spec import hgrn2

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# PyTorch's kernels of attention in the order of preference. cuDNN's would make a plan for each shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# The head dimension of attention: RoPE needs more than a few channels.
HEAD = 64
# The standard deviation of initial weights, times the root of the width. Megatron's default of 0.02 is for wide models.
# With 1, attention of width 64 takes more than twice as many steps until it begins to recall.
INITIAL = 0.4
WEIGHT_DECAY, CLIP = 0.1, 1.0
# The share of the steps in which the learning rate rises.
WARM_UP = 0.1


def start():
    """Set Megatron up for one process without torchrun, on gloo, because a thread of NCCL would disturb a capture.

    A second call changes nothing.
    """
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # This tracker does not read the generator's state. A capture does not allow that.
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)


class Attention(torch.nn.Module):
    """Causal attention by PyTorch's fused kernels, in the place of Megatron's DotProductAttention.

    Megatron's own module keeps a score for each pair of tokens. At 32,768 tokens that is 2 GiB per head in bf16.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **ignored) -> Tensor:
        """Return the attention's output, [s, b, h], from queries, keys and values, [s, b, heads, channels]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with sdpa_kernel(KERNELS):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def build(kind: Kind, vocab: int, length: int, seed: int) -> GPTModel:
    """Build a GPT from Megatron's own unfused modules, with tied embeddings.

    Args:
        kind: its mixer and size.
        vocab: tokens in the vocabulary.
        length: the longest sequence of the training. Without learned positions, longer ones work too.
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    settings = dict(
        **BLOCK,
        num_layers=kind.layers,
        hidden_size=kind.width,
        ffn_hidden_size=2 * kind.width,
        num_attention_heads=max(1, kind.width // HEAD),
        params_dtype=torch.float32,
        bf16=ON_GPU,
        transformer_impl="local",
        init_method_std=INITIAL * kind.width**-0.5,
        # All devices draw the same weights.
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    if kind.expand:
        more = dict(hgrn2_expand_ratio=kind.expand, hgrn2_layer_pattern=kind.pattern)
        config, spec = HGRN2TransformerConfig(**settings, **more), hgrn2
    else:
        config, spec = TransformerConfig(**settings), get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab,
        max_sequence_length=length,
        position_embedding_type="rope" if "*" in kind.pattern and kind.positions else "none",
        share_embeddings_and_output_weights=True,
    )
    for layer in model.decoder.layers:
        if hasattr(layer.self_attention, "core_attention"):
            layer.self_attention.core_attention = Attention()
    if model.position_embedding_type == "rope":
        # Megatron keeps the positions of 32 models and lengths. A graph would read those that it drops.
        model.rotary_pos_emb.forward = functools.cache(model.rotary_pos_emb.forward)
    return model.to("cuda")


class Recaller:
    """A model whose output layer computes only the queries of a batch."""

    def __init__(self, model: GPTModel):
        self.model = model
        self.queries: Tensor | None = None
        model.output_layer.register_forward_pre_hook(self._at_queries)

    def _at_queries(self, layer, args: tuple) -> tuple:
        """Return the hidden states at the queries, [questions, b, h], from those at all positions, [s, b, h]."""
        hidden, *rest = args
        index = self.queries.t().unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(0, index), *rest

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits at the queries, [batch, questions, vocab]."""
        self.queries = batch.queries
        return self.model(batch.tokens, None, None)

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the mean loss over the queries, the logits, and the gradient of each parameter."""
        logits = self.logits(batch)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.answers.flatten())
        return loss.detach(), logits.detach(), torch.autograd.grad(loss, list(self.model.parameters()))


class Learner:
    """A model and its AdamW optimizer with fp32 copies of the weights. Only matrices have weight decay.

    Args:
        model: a model with fp32 weights, which become bf16 on a GPU.
        lr: the highest learning rate. The rate rises over the first 10% of the steps and falls as a cosine to 0.
        steps: length of the whole training.
        shapes: the shape of each batch that will come.
        graphs: capture the steps in CUDA graphs.
    """

    def __init__(self, model: GPTModel, lr: float, steps: int, shapes: list[Shape], graphs: bool = ON_GPU):
        self.masters = [p.detach().clone() for p in model.parameters()]
        self.recaller, self.params = Recaller(model.to(DTYPE)), list(model.parameters())
        self.peak, self.steps, self.step = lr, steps, 0
        self.lr = torch.tensor(lr, device=self.masters[0].device)
        matrices = [p for p in self.masters if p.dim() > 1]
        vectors = [p for p in self.masters if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=vectors, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True, capturable=graphs)
        # The loss and the accuracy of each step.
        self.history = torch.zeros(steps, 2, device=self.lr.device)
        self.stream = torch.cuda.Stream() if ON_GPU else None
        self.graphs = self._capture(shapes) if graphs else {}

    def _update(self, batch: Batch) -> Tensor:
        """Take one step of training, and return the loss and the accuracy, [2] fp32."""
        loss, logits, gradients = self.recaller.gradients(batch)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        right = (logits.argmax(-1) == batch.answers).float().mean()
        return torch.stack([loss, right])

    def _capture(self, shapes: list[Shape]) -> dict:
        """Return a graph, its batch and its result for each shape. The weights do not change."""
        initial, graphs, pool = [p.clone() for p in self.masters], {}, torch.cuda.graph_pool_handle()
        for shape in shapes:
            batch = shape.zeros()
            # The current stream makes the zeros. Without this wait the warm-up could read them too early.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    self._update(batch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # The graphs of other learners have other streams and run at the same time.
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                result = self._update(batch)
            graphs[shape] = graph, batch, result
        with torch.no_grad(), torch.cuda.stream(self.stream):
            torch._foreach_copy_(self.masters, initial)
            torch._foreach_copy_(self.params, initial)
            for state in self.optimizer.state.values():
                torch._foreach_zero_(list(state.values()))
        torch.cuda.synchronize()
        return graphs

    def learn(self, batch: Batch):
        """Take one step. On a GPU it runs on this learner's stream, and nothing waits for it."""
        if self.stream is None:
            return self._learn(batch)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._learn(batch)
        for x in batch:
            x.record_stream(self.stream)

    def _learn(self, batch: Batch):
        self.lr.fill_(self.peak * schedule(self.step, self.steps))
        if self.graphs:
            graph, own, result = self.graphs[_shape(batch)]
            for mine, given in zip(own, batch, strict=True):
                mine.copy_(given)
            graph.replay()
        else:
            result = self._update(batch)
        self.history[self.step].copy_(result)
        self.step += 1

    @torch.no_grad()
    def right(self, batch: Batch) -> Tensor:
        """Return where the right answer is the most likely token of the vocabulary, [batch, questions] bool."""
        return self.recaller.logits(batch).argmax(-1) == batch.answers


def _shape(batch: Batch) -> Shape:
    return Shape(*batch.tokens.shape, batch.queries.shape[1])


def schedule(step: int, steps: int) -> float:
    """Return the factor on the learning rate in a step, counted from 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
