"""Every layout trains the same model: losses, gradients, their norms and weights of real Megatron ranks over gloo."""

import functools
import itertools
import json
import os

import harness
import parity
import products
import pytest
import torch
from parity import CHUNKED, DISTRIBUTED, RECOMPUTE, SELECTIVE

EXPERTS = {
    "num_moe_experts": 4,
    "moe_layer_freq": [0, 1, 0, 1],
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
DEPTH = {"num_layers": 4}
HEAD_DIM = 16
MODELS = {
    "hgrn2": {},
    # two layers in a row are a pipeline stage without an HGRN2 layer, and the first the one whose gradients overlap
    "hybrid": {"hgrn2_layer_pattern": "**HH"},
    "tied": {"tied": True},
    "per-token-loss": {"calculate_per_token_loss": True},
    "experts": EXPERTS,
    # with two stages of two virtual stages each, two of them have no HGRN2 layer
    "experts-hybrid": EXPERTS | {"hgrn2_layer_pattern": "**HH"},
    "stack-pure": {"hybrid_layer_pattern": "M-M-M-M-"},
    # a HybridModel, whose first half has no HGRN2 layer
    "stack": {"hybrid_layer_pattern": "*-*-M-M-"},
    # two mixers in each of four segments
    "stack-deep": {"hybrid_layer_pattern": "*-*-M-M-M-M-*-M-"},
    "stack-experts": EXPERTS | {"hybrid_layer_pattern": "M-*EMEM-"},
    # heads of multi-token prediction
    "mtp": {"hybrid_layer_pattern": "M-*-M-/M-/M-", "mtp_loss_scaling_factor": 1.0},
    "mtp-tied": {"hybrid_layer_pattern": "M-*-/M-", "mtp_loss_scaling_factor": 1.0, "tied": True},
    "mtp-experts": EXPERTS | {"hybrid_layer_pattern": "M-ME/ME", "mtp_loss_scaling_factor": 1.0},
    "mtp-attention": {"hybrid_layer_pattern": "M-M-/*-", "mtp_loss_scaling_factor": 1.0},
    "latent": {"hybrid_layer_pattern": "M-+-M-+-"} | harness.LATENT,
}
# Megatron's Muon without rounding to bf16, by its mode of tensor parallelism
for mode in "blockwise", "duplicated", "distributed":
    muon = {"muon_tp_mode": mode, "muon_fp32_matmul_prec": "highest"}
    MODELS[f"muon-{mode}"] = {"hybrid_layer_pattern": "M-*-M-M-", "muon": muon}
    MODELS[f"muon-{mode}-step"] = MODELS[f"muon-{mode}"] | {"steps": 1}
# losses of padding do not count; Megatron's rotary positions know documents alone
PACKED = {"calculate_per_token_loss": True}
for packing, positions in ("documents", "rope"), ("stream", "none"):
    own = PACKED | {"hgrn2_packed_layout": packing}
    MODELS[f"packed-{packing}"] = own
    MODELS[f"packed-hybrid-{packing}"] = own | {"hgrn2_layer_pattern": "H**H", "position_embedding_type": positions}
MODELS["stack-packed"] = PACKED | {"hgrn2_packed_layout": "documents", "hybrid_layer_pattern": "M-M-"}
FSDP = {"distributed_optimizer": True, "fsdp": "optim_grads_params"}
# the schedule that combines the forward of a micro-batch with the backward of another; it demands bf16 of the config
COMBINED = {"overlap_moe_expert_parallel_comm": True, "moe_token_dispatcher_type": "alltoall", "bf16": True}
DELAYED = {"delay_wgrad_compute": True, "recompute_granularity": "selective"}
OFFLOAD = {
    "fine_grained_activation_offloading": True,
    "offload_modules": ["qkv_linear", "core_attn", "attn_proj", "attn_norm", "mlp_norm"],
    "min_offloaded_tensor_size": 1000,
}
# the last stage has no layer at all
UNEVEN = [["embedding", "decoder"], ["decoder", "decoder"], ["decoder"], ["loss"]]
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2-sequence-parallel": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2-recompute": (2, {"pp": 2, "config": RECOMPUTE}),
    "tp2-recompute-selective": (2, {"tp": 2, "config": SELECTIVE}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp4-uneven": (4, {"pp": 4, "config": {"pipeline_model_parallel_layout": UNEVEN}}),
    "dp2": (2, {"overlap": True}),
    "dp2-distributed-optimizer": (2, DISTRIBUTED),
    "pp2-dp2-distributed-optimizer": (4, {"pp": 2} | DISTRIBUTED),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "tp2-sequence-parallel-offload": (2, {"tp": 2, "sequence_parallel": True, "config": OFFLOAD}),
    "cp2": (2, {"cp": 2}),
    "cp2-recompute": (2, {"cp": 2, "config": RECOMPUTE}),
    "cp4": (4, {"cp": 4}),
    "cp2-tp2-sequence-parallel": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "cp2-pp2": (4, {"cp": 2, "pp": 2}),
    "cp2-dp2-distributed-optimizer": (4, {"cp": 2} | DISTRIBUTED),
    "tp2-loss-by-chunks": (2, {"tp": 2, "config": CHUNKED}),
    "tp2-sequence-parallel-loss-by-chunks": (2, {"tp": 2, "sequence_parallel": True, "config": CHUNKED}),
    "cp2-loss-by-chunks": (2, {"cp": 2, "config": CHUNKED}),
    "dp2-loss-by-chunks": (2, DISTRIBUTED | {"config": CHUNKED}),
    "pp2-loss-by-chunks": (2, {"pp": 2, "config": CHUNKED}),
    # --hybrid-context-parallel: Megatron gives each document a group of its own, by these tokens per rank
    "groups-of-1-and-2": (4, {"cp": 2, "config": {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 8}}),
    "groups-of-2-and-4": (4, {"cp": 2, "config": {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 4}}),
    "ep2": (2, {"ep": 2}),
    "ep2-alltoall": (2, {"ep": 2, "config": {"moe_token_dispatcher_type": "alltoall"}}),
    "ep2-pp2": (4, {"ep": 2, "pp": 2}),
    "ep2-cp2-distributed-optimizer": (4, {"ep": 2, "cp": 2} | DISTRIBUTED),
    "ep2-combined": (2, {"ep": 2, "overlap": True, "config": COMBINED | CHUNKED | DELAYED}),
    "ep2-combined-offload": (2, {"ep": 2, "overlap": True, "config": COMBINED | OFFLOAD}),
    "ep2-combined-pp2-vpp2": (4, {"ep": 2, "pp": 2, "vpp": 2, "overlap": True, "config": COMBINED}),
    # of the stack alone: `|` between segments of so many layers, one of which has no mixer, and one no layer at all
    "pp2-segments": (2, {"pp": 2, "segments": [3, 5]}),
    "pp2-vpp2-segments": (2, {"pp": 2, "vpp": 2, "segments": [2, 3, 1, 2]}),
    "pp2-vpp2-segments-offload": (2, {"pp": 2, "vpp": 2, "segments": [4, 4, 4, 4], "config": OFFLOAD}),
    "pp2-empty-segment": (2, {"pp": 2, "segments": [8, 0]}),
    "pp2-dp2-segments": (4, {"pp": 2, "segments": [3, 5]} | DISTRIBUTED),
    # of the models with heads: a last stage whose head alone has an HGRN2 layer, or that has nothing but the head
    "pp2-mtp": (2, {"pp": 2, "config": {"hybrid_layer_pattern": "M-|*-/M-"}}),
    "pp2-mtp-recompute": (2, {"pp": 2, "config": RECOMPUTE | {"hybrid_layer_pattern": "M-*-|M-/M-/M-"}}),
    "pp2-mtp-vpp2-segments": (2, {"pp": 2, "vpp": 2, "config": {"hybrid_layer_pattern": "M-|*-|M-|/M-/M-"}}),
    "pp2-mtp-loss-by-chunks": (2, {"pp": 2, "config": CHUNKED | {"hybrid_layer_pattern": "M-*-|M-/M-/M-"}}),
}
LAYOUTS |= {
    "dp2-fsdp": (2, FSDP),
    "dp2-fsdp-optim-grads": (2, FSDP | {"fsdp": "optim_grads"}),
    "dp2-fsdp-optim": (2, FSDP | {"fsdp": "optim"}),
    "dp2-fsdp-no-shard": (2, FSDP | {"fsdp": "no_shard"}),
    "dp2-fsdp-recompute": (2, FSDP | {"config": RECOMPUTE}),
    "dp2-fsdp-optim-recompute": (2, FSDP | {"fsdp": "optim", "overlap": True, "config": RECOMPUTE}),
    "dp2-fsdp-loss-by-chunks": (2, FSDP | {"config": CHUNKED}),
    "cp2-fsdp": (2, FSDP | {"cp": 2}),
    "ep2-fsdp": (4, FSDP | {"ep": 2}),
    "tp2-sequence-parallel-dp2-fsdp": (4, FSDP | {"tp": 2, "sequence_parallel": True}),
}
# layouts that not every model has
SPECIAL = ("ep2", "segment", "chunks", "mtp", "groups", "offload", "fsdp")
GPT_LAYOUTS = [layout for layout in LAYOUTS if not any(part in layout for part in SPECIAL)]
CASES = [("hgrn2", layout) for layout in GPT_LAYOUTS]
# a HybridModel below has the other layouts of a hybrid
CASES += [("hybrid", layout) for layout in ("tp2-sequence-parallel", "pp2-vpp2", "pp4-uneven", "tp2-pp2", "cp4")]
CASES += [("hybrid", layout) for layout in ("dp2-distributed-optimizer", "pp2-dp2-distributed-optimizer")]
CASES += [("per-token-loss", "cp2")]
CASES += [(model, layout) for layout in ("cp2", "cp4") for model in MODELS if model.startswith("packed")]
CASES += [("packed-documents", "groups-of-1-and-2"), ("stack-packed", "groups-of-2-and-4")]
CASES += [("tied", "pp2"), ("tied", "pp2-vpp2"), ("tied", "pp2-dp2-distributed-optimizer")]
CASES += [("stack", f"{layout}-loss-by-chunks") for layout in ("tp2", "tp2-sequence-parallel", "cp2", "dp2", "pp2")]
CASES += [("hgrn2", "tp2-sequence-parallel-loss-by-chunks"), ("tied", "pp2-loss-by-chunks")]
CASES += [("per-token-loss", "pp2"), ("per-token-loss", "dp2-distributed-optimizer")]
CASES += [("experts", layout) for layout in ("pp2", "dp2", "ep2", "ep2-pp2", "ep2-cp2-distributed-optimizer")]
CASES += [("stack-deep", "pp2-vpp2-segments-offload"), ("hybrid", "tp2-sequence-parallel-offload")]
CASES += [("experts", "ep2-combined"), ("experts", "ep2-combined-offload")]
CASES += [("experts-hybrid", "ep2-combined-pp2-vpp2")]
CASES += [("stack", layout) for layout in ("tp2", "tp2-sequence-parallel", "pp2", "pp2-recompute", "cp2")]
CASES += [("stack", layout) for layout in ("pp2-vpp2-segments", "pp2-empty-segment", "pp2-dp2-distributed-optimizer")]
SEGMENTS = ("pp2-segments", "pp2-vpp2-segments", "pp2-dp2-segments")
CASES += [("stack-pure", layout) for layout in ("tp2-sequence-parallel", "cp2", "dp2-distributed-optimizer", *SEGMENTS)]
CASES += [("stack", layout) for layout in ("pp2-segments", "dp2-distributed-optimizer")]
CASES += [
    ("stack-experts", layout) for layout in ("ep2", "dp2-distributed-optimizer", "tp2-sequence-parallel", *SEGMENTS)
]
CASES += [("mtp", layout) for layout in ("tp2-sequence-parallel", "pp2-mtp-recompute", "pp2-mtp-vpp2-segments")]
CASES += [("mtp", layout) for layout in ("cp2", "dp2-distributed-optimizer", "tp2-recompute-selective")]
CASES += [("mtp", f"{layout}-loss-by-chunks") for layout in ("tp2-sequence-parallel", "cp2", "dp2", "pp2-mtp")]
CASES += [("mtp-attention", layout) for layout in ("tp2-sequence-parallel", "pp2", "cp2")]
CASES += [("mtp-tied", "pp2-mtp"), ("mtp-experts", "ep2-alltoall")]
CASES += [("stack", layout) for layout in LAYOUTS if "fsdp" in layout and layout[:3] not in ("cp2", "ep2")]
CASES += [
    ("hgrn2", "dp2-fsdp-optim-recompute"),
    ("hgrn2", "tp2-sequence-parallel-dp2-fsdp"),
    ("hgrn2", "cp2-fsdp"),
]
CASES += [("stack-experts", "ep2-fsdp"), ("mtp", "dp2-fsdp"), ("tied", "dp2-fsdp")]
CASES += [("latent", "tp2-sequence-parallel"), ("latent", "pp2-dp2-distributed-optimizer")]
CASES += [("muon-duplicated", "tp2-sequence-parallel"), ("muon-distributed", "tp2")]
if "PRODUCTS" in os.environ:
    DRAWN = products.draw(int(os.environ["PRODUCTS"]))
    CASES += DRAWN
    LAYOUTS |= {name: layout for (_, name), layout in DRAWN.items()}


def with_segments(model: dict, layout: dict) -> dict:
    """Return a HybridModel whose pattern has a `|` after each segment of a layout but the last."""
    if "segments" not in layout:
        return model
    symbols = iter(model["hybrid_layer_pattern"])
    segments = ["".join(itertools.islice(symbols, length)) for length in layout["segments"]]
    return model | {"hybrid_layer_pattern": "|".join(segments) + "".join(symbols)}


# those that also run against the older release of megatron-core
ON_RELEASES = [("hgrn2", "tp2-sequence-parallel"), ("hybrid", "pp2-vpp2"), ("hgrn2", "dp2-distributed-optimizer")]
ON_RELEASES += [("muon-duplicated", "tp2-sequence-parallel"), ("experts", "ep2-combined")]
ON_RELEASES += [("stack", "dp2-fsdp-recompute")]
PARAMETERS = [pytest.param(*case, marks=pytest.mark.releases if case in ON_RELEASES else ()) for case in CASES]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Every run of the selected cases by (model, layout), those of as many processes in the same ones."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    cases = [(p["model"], p["layout"]) for p in params]
    folder = tmp_path_factory.mktemp("parity")
    harness.start_megatron()
    for name in dict(cases):
        model = harness.build_model(**parity.of_model(MODELS[name]) | DEPTH)
        torch.save(harness.full_weights(model), folder / f"{name}.weights")

    @functools.cache
    def run(num_processes: int):
        # Cases of the same process groups follow each other.
        chosen = [c for c in cases if c[1] in LAYOUTS and LAYOUTS[c[1]][0] == num_processes]
        chosen.sort(key=lambda case: parity.group_sizes(LAYOUTS[case[1]][1]))
        if num_processes == 1:
            chosen = [(model, "one") for model in dict(cases)]
        runs = {}
        for model, name in chosen:
            layout = LAYOUTS.get(name, (1, {}))[1]
            whole = with_segments(MODELS[model], layout) | DEPTH
            runs[f"{model}-{name}"] = {"weights": f"{model}.weights", "model": whole, "layout": layout}
        worker = harness.ROOT / "tests" / "parallel" / "worker.py"
        done = harness.torchrun(num_processes, str(worker), str(folder), json.dumps(runs), timeout=900)
        assert done.returncode == 0, done.stdout[-6000:]

    def result(model: str, layout: str) -> dict[str, torch.Tensor]:
        if layout == "start":
            return torch.load(folder / f"{model}.weights")
        run(LAYOUTS[layout][0] if layout in LAYOUTS else 1)
        files = sorted(folder.glob(f"{model}-{layout}.[0-9]*"))
        return parity.put_together([torch.load(file) for file in files])

    return result


@pytest.mark.parametrize(("model", "layout"), PARAMETERS)
def test_layout_equals_one_process(model, layout, results):
    harness.assert_all_close(results(model, layout), results(model, "one"), tolerance=1e-5)


@pytest.mark.releases
@pytest.mark.parametrize("layout", ["one", "tp2"])
@pytest.mark.parametrize("model", [f"muon-{mode}-step" for mode in ("blockwise", "duplicated", "distributed")])
def test_muon_takes_each_matrix_by_itself(model, layout, results):
    start, end = results(model, "start"), results(model, layout)
    clip = parity.LARGEST_NORM / end["gradient norms"][0]
    assert clip < 1
    # In this mode, a rank orthogonalizes the rows or columns that it has.
    blocks = 2 if (model, layout) == ("muon-blockwise-step", "tp2") else 1
    expected = {}
    for name, before in start.items():
        gradient = end[f"gradient {name}"]
        if "in_proj" in name or "linear_qkv" in name:
            # a head's rows are q, f and v, or queries, keys and values
            q, f, v = gradient.unflatten(0, (-1, 3, HEAD_DIM)).unbind(1)
            parts = [parity.orthogonalized(x.flatten(0, 1), blocks, dim=0).view_as(x) for x in (q, f, v)]
            step = torch.stack(parts, 1).view_as(gradient)
        elif "out_proj" in name or "linear_proj" in name:
            step = parity.orthogonalized(gradient, blocks, dim=1)
        elif "mlp.linear" in name:
            continue
        else:
            step = clip * gradient / (clip * gradient.abs() + parity.ADAM_EPS)
        decayed = before * (1 - parity.LR * parity.WEIGHT_DECAY)
        expected[name] = decayed - parity.LR * step - before
    assert sum("in_proj" in name for name in expected) == 3 and any("hgrn2_bounds" in name for name in expected)
    moved = {name: end[f"weight {name}"] - start[name] for name in expected}
    harness.assert_all_close(moved, expected, tolerance=1e-4)
