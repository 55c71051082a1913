"""Real Megatron models for tests: a small HGRN2 GPT or HybridModel on the CPU, on one process or several over gloo.

The weights are drawn once for one process, and each rank takes its slices of them. Gradients are gathered into full
tensors. So every layout can be compared with one process, parameter by parameter.
"""

import atexit
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import relative_error
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = ":".join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
VOCAB, SEQ, BATCH = 64, 40, 4
# a HybridModel with multi-latent attention, small enough for the model below
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float):
    """Assert that tensors of the same name agree up to a relative error of `tolerance`.

    No tensor may be missing. No expected tensor may be zero, because its comparison would mean nothing.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert want.norm() > 0, f"{name} is zero: the comparison would be empty"
    errors = {name: relative_error(actual[name], want) for name, want in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong


class Group:
    """A stand-in for a process group that nothing is sent through. It has a rank and a size."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = lambda: rank, lambda: size


def start_megatron(tp: int = 1, cpu_mode: bool = False, pp: int = 1):
    """Join the process group and set Megatron's parallel state. Without torchrun, the group has one process.

    Args:
        tp: tensor-parallel size.
        cpu_mode: whether to turn on the project's CPU mode. Megatron's data parallelism needs it, and a plain forward
            and backward do not. It stays on, so only processes of their own may ask for it. On a machine with a GPU,
            such a process runs on the GPU.
        pp: pipeline-parallel size.
    """
    if cpu_mode:
        from hgrn2_megatron import cpu

        cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.is_initialized():
        return
    if not cpu_mode:
        # Megatron places buffers on this device, and calls no other function of torch.cuda here
        torch.cuda.current_device = lambda: "cpu"
    defaults = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    on_gpu = cpu_mode and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    atexit.register(leave)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)


def leave():
    """Destroy the process groups. A process whose groups still have threads at its end can abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_model(
    tp: int = 1,
    sequence_parallel: bool = False,
    num_layers: int = 3,
    tied: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **config,
):
    """Return an HGRN2 model in fp32 that Megatron builds from the spec, or a pipeline stage's chunk of one.

    Args:
        tp: tensor-parallel size.
        sequence_parallel: whether the model uses sequence parallelism.
        num_layers: number of layers.
        tied: whether embeddings and output share a weight.
        pre_process, post_process, vp_stage: as in GPTModel.
        config: settings of the model that replace the defaults here. With `hybrid_layer_pattern` the model is a
            HybridModel, and otherwise a GPT.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from hgrn2_megatron.arguments import BLOCK, HGRN2MLATransformerConfig, HGRN2TransformerConfig
    from hgrn2_megatron.spec import hgrn2, hgrn2_stack

    pattern = config.pop("hybrid_layer_pattern", None)
    positions = "rope" if "*" in (pattern or config.get("hgrn2_layer_pattern", "H")) else "none"
    positions = config.pop("position_embedding_type", positions)
    if pattern:
        main, *heads = pattern.split("/")
        # Megatron's command line takes both numbers from the pattern.
        numbers = dict(num_layers=len(main.replace("|", "")), mtp_num_layers=len(heads) or None)
        config = dict(is_hybrid_model=True, **numbers) | config
        form = functools.partial(HybridModel, hybrid_stack_spec=hgrn2_stack, hybrid_layer_pattern=pattern)
    else:
        form = functools.partial(GPTModel, transformer_layer_spec=hgrn2)
    settings = dict(
        **BLOCK,
        num_layers=num_layers,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        hgrn2_expand_ratio=16,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        transformer_impl="local",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # larger than Megatron's default, so that gates and bounds leave the range in which they are nearly linear
        init_method_std=0.2,
    )
    config_class = HGRN2MLATransformerConfig if "+" in (pattern or "") else HGRN2TransformerConfig
    config = config_class(**settings | config)
    if pattern:
        # in a run with a command line, Megatron's args have this attribute
        config.hybrid_layer_pattern = pattern
    model = form(
        config=config,
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        position_embedding_type=positions,
        share_embeddings_and_output_weights=tied,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    return model


def full_weights(model, seed: int = 1) -> dict[str, Tensor]:
    """Return weights for a model on one process: its own weights, with noise on those that start as constants."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for w in weights.values():
        if w.dim() == 1:  # norms start at 1, lower bounds at 0: symmetric values hide errors
            w += 0.5 * torch.randn(w.shape, generator=generator)
    return weights


def shard(name: str, param: torch.nn.Parameter, full: Tensor, rank: int, size: int, rows: int) -> Tensor:
    """Return the slice of a full weight that TP rank `rank` holds. The lower bounds have `rows` rows."""
    if not getattr(param, "tensor_model_parallel", False):
        return full
    if "hgrn2_bounds" in name:
        return full.view(rows, -1).chunk(size, 1)[rank].reshape(-1)
    if "linear_fc1" in name:  # [gate | up], each sharded on its own
        return torch.cat([part.chunk(size)[rank] for part in full.chunk(2)])
    return full.chunk(size, param.partition_dim)[rank]


def unshard(name: str, param: torch.nn.Parameter, parts: list[Tensor], rows: int) -> Tensor:
    """Return the full tensor of which TP rank r holds parts[r]. A replicated tensor must be equal on all ranks."""
    if not getattr(param, "tensor_model_parallel", False):
        for part in parts[1:]:
            torch.testing.assert_close(part, parts[0], rtol=1e-6, atol=1e-9)
        return parts[0]
    if "hgrn2_bounds" in name:
        return torch.cat([part.view(rows, -1) for part in parts], 1).reshape(-1)
    if "linear_fc1" in name:
        return torch.cat([torch.cat(half) for half in zip(*(p.chunk(2) for p in parts), strict=True)])
    return torch.cat(parts, param.partition_dim)


def batch(seed: int = 2, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return random tokens and labels, [size, SEQ] int64."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(VOCAB, (size, SEQ + 1), generator=generator)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def packed_seq_params(lengths: list[int], padded: list[int] | None = None):
    """Return PackedSeqParams as Megatron's pretrain_gpt.py makes them. `padded` has the lengths with padding."""
    from megatron.core.packed_seq_params import PackedSeqParams

    def borders(sizes):
        return torch.tensor([0, *sizes]).cumsum(0).int()

    real = borders(lengths)
    with_padding = None if padded is None else borders(padded)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=with_padding,
        cu_seqlens_kv_padded=with_padding,
        max_seqlen_q=max(padded or lengths),
        max_seqlen_kv=max(padded or lengths),
    )


def needs_gpus(count: int):
    """Skip the test unless there are so many GPUs."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


def load(script: str):
    """Import a script, given by its path in the checkout, under a name that no other module has."""
    name = re.sub(r"\W", "_", script.removesuffix(".py"))
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """Return the environment of a process that imports this project and its tests."""
    path = ":".join([PYTHONPATH, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # a Megatron-LM checkout builds its dataset helpers with the python3 of PATH
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TRITON_INTERPRET"):
        environment.pop(name, None)
    return environment


def python(*command: str, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run this interpreter on `command` in the project's root. Its stdout holds stderr too."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def torchrun(num_processes: int, *command: str, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc_per_node num_processes ...` on this machine."""
    run = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}")
    return python(*run, *command, timeout=timeout)
