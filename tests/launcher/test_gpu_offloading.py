"""On GPUs, activations or the optimizer on the host, and overlapped exchanges of experts: the losses stay equal."""

import harness
import pytest
from training import HGRN2, STACK, train

pytestmark = pytest.mark.gpu

TE = ("--transformer-impl", "transformer_engine", "--bf16", "--no-persist-layer-norm", "--no-rope-fusion")
GPT = (*HGRN2, "--num-layers", 4, "--hgrn2-layer-pattern", "H*HH", *TE, "--no-masked-softmax-fusion")
HYBRID = (*STACK, "--hybrid-layer-pattern", "M-*-M-ME", "--num-experts", 4, "--moe-grouped-gemm", *TE)
FORMS = {"gpt": (GPT, "examples/pretrain_gpt.py"), "stack": (HYBRID, "examples/pretrain_hybrid.py")}
EXPERTS = ("--num-experts", 4, "--moe-token-dispatcher-type", "alltoall", "--moe-grouped-gemm")
EP2 = (*EXPERTS, "--expert-model-parallel-size", 2, "--global-batch-size", 8)
OFFLOAD = ("--fine-grained-activation-offloading", "--min-offloaded-tensor-size", 1000, "--offload-modules")
OPTIMIZER = ("--use-distributed-optimizer", "--use-precision-aware-optimizer")


@pytest.fixture(autouse=True)
def transformer_engine(monkeypatch):
    pytest.importorskip("transformer_engine.pytorch")
    # Megatron demands it for fine-grained offloading, so that Transformer Engine leaves the weights on the GPU.
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")


def assert_same_losses(model: tuple, flags: tuple, without: tuple = (), **options):
    """Train with some flags and with others in their place, and compare the losses."""
    losses, _ = train(*model, *flags, **options)
    want, _ = train(*model, *without, **options)
    assert losses.keys() == want.keys()
    for iteration, loss in losses.items():
        assert abs(float(loss) - float(want[iteration])) <= 5e-3, (iteration, losses, want)


@pytest.mark.parametrize("recompute", [(), ("--recompute-granularity", "selective")], ids=["kept", "selective"])
@pytest.mark.parametrize("form", FORMS)
def test_fine_grained_offloading_leaves_the_losses(form, recompute):
    model, script = FORMS[form]
    experts = ("expert_fc1", "moe_act", "mlp_norm") if form == "stack" else ()
    modules = ("qkv_linear", "core_attn", "attn_proj", *experts)
    assert_same_losses((*model, *recompute), (*OFFLOAD, *modules), script=script)


def test_whole_layers_of_a_gpt_are_offloaded():
    assert_same_losses(GPT, ("--cpu-offloading-num-layers", 2))


def test_the_optimizer_is_offloaded():
    offload = ("--optimizer-cpu-offload", "--optimizer-offload-fraction", 1.0)
    assert_same_losses(GPT, (*OPTIMIZER, *offload), OPTIMIZER)


@pytest.mark.parametrize(
    "flags",
    [(), ("--delay-wgrad-compute",), ("--delay-wgrad-compute", "--use-distributed-optimizer", "--overlap-grad-reduce")],
    ids=["overlap", "delayed", "delayed-and-reduced"],
)
def test_exchanges_of_experts_overlap(flags):
    harness.needs_gpus(2)
    overlap = ("--overlap-moe-expert-parallel-comm", *flags)
    assert_same_losses(GPT, (*EP2, *overlap), EP2, num_processes=2)
