"""Train with and without offloaded activations: equal gradients, and what is offloaded is freed. Prints what moved.

offloaded.py SETTINGS

SETTINGS is what `harness.build_model` takes, as JSON, or "bf16": true. It runs on a GPU if there is one.
"""

import json
import os
import sys

import harness
import offload_on_cpu
import torch
from torch.multiprocessing.reductions import StorageWeakRef

BATCH, MICRO_BATCHES, STEPS = 2, 3, 3
MIXER = ("qkv_linear", "core_attn", "attn_proj")
NORMS = ("attn_norm", "mlp_norm")


def gradients(dtype: torch.dtype, modules: tuple = (), **settings) -> tuple[dict, list]:
    """Return the gradients of all steps, and for each mixer the memory of its parts' inputs between the passes.

    Megatron offloads more in the first step than in the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from hgrn2_megatron import mixer

    offload_on_cpu.reset()
    if modules:
        settings |= dict(fine_grained_activation_offloading=True, offload_modules=list(modules))
        settings |= dict(min_offloaded_tensor_size=1000)
    torch.manual_seed(0)
    model = harness.build_model(**settings, params_dtype=dtype)
    model.load_state_dict(harness.full_weights(model), strict=False)
    model.to("cuda", dtype)
    mixers = [module for module in model.modules() if isinstance(module, mixer.HGRN2Mixer)]
    watched: list[list] = []
    alive: list[list[bool]] = []

    def watch(module, args):
        watched[-1].append(StorageWeakRef(args[0].untyped_storage()))

    for each in mixers:
        for part in (each.in_proj, each.norm, each.out_proj):
            part.register_forward_pre_hook(watch)

    def forward_step(batches, model):
        tokens, labels = next(batches)
        watched.append([])

        def loss_func(losses):
            alive.append([is_held(memory) for memory in watched[-1]])
            return losses.mean(), {}

        return model(tokens, torch.arange(harness.SEQ, device="cuda").expand_as(tokens), None, labels=labels), loss_func

    def run(forward_only: bool):
        batches = (tuple(x.to("cuda") for x in harness.batch(n, BATCH)) for n in range(MICRO_BATCHES))
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=harness.SEQ,
            micro_batch_size=BATCH,
            forward_only=forward_only,
        )

    found = {}
    for step in range(STEPS):
        if step:
            # evaluation between the steps does not confuse the manager
            model.eval()
            with torch.no_grad():
                run(forward_only=True)
        model.train().zero_grad()
        run(forward_only=False)
        found |= {f"{name} in step {step}": p.grad.cpu().clone() for name, p in model.named_parameters()}
    return found, alive[-1]


def is_held(memory: StorageWeakRef) -> bool:
    """Return whether there is memory behind a storage. Megatron frees some of it by force, and the storage stays."""
    storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
    return storage is not None and storage.nbytes() > 0


def moved() -> dict[str, set[int]]:
    """Return the bytes that one part of a name moved, by name."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

    result: dict[str, set[int]] = {}
    for chunk in PipelineOffloadManager.get_instance()._cached_chunks_forward:
        for group in chunk.offload_groups:
            result.setdefault(group._name, set()).add(group.total_offload_bytes)
    return result


def main(settings: dict):
    # Transformer Engine would otherwise move weights too. Megatron demands this of a run with its command line.
    os.environ["NVTE_CPU_OFFLOAD_V1"] = "1"
    harness.start_megatron(cpu_mode=True)
    offload_on_cpu.install()
    dtype = torch.bfloat16 if settings.pop("bf16", False) else torch.float32
    local = settings.get("transformer_impl", "local") == "local"
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    one = harness.SEQ * BATCH * 64 * dtype.itemsize
    forms = {"stack": {"hybrid_layer_pattern": "M-*-M-"}, "mtp": {"hybrid_layer_pattern": "M-M-/M-"}}
    forms |= {"gpt": {"hgrn2_layer_pattern": "H*H"}, "recompute": {"recompute_granularity": "selective"}}
    for name, form in forms.items():
        want, kept = gradients(dtype, **form, **settings)
        found, alive = gradients(dtype, (*MIXER, *NORMS), **form, **settings)
        harness.assert_all_close(found, want, tolerance)
        sizes = moved()
        print(name, sizes, flush=True)
        assert sizes["attn_proj"] == {one} and min(sizes["core_attn"]) >= 3 * one, sizes
        assert kept[:2] == [True, True] and not (local and any(alive[:-3])), (kept, alive)
        # Megatron leaves the last part of each name where it is.
        assert not any(alive[1:-3:3] + alive[2:-3:3]), alive
    print("gradients equal")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
