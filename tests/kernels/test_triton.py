"""The Triton kernels of the operator: in the interpreter where there is no GPU (fp32), on the GPU in every dtype."""

from functools import partial

import pytest
import torch
from operator_cases import ALL_GATES, CEILING, NAMES, assert_equal, bounds, make_inputs, relative_error, run
from rounding_twin import twin
from torch.utils.checkpoint import checkpoint

from hgrn2_kernels import chunk_plan, chunk_triton, op, recurrent_hgrn2, shard_states, torch_ops, triton_math
from hgrn2_kernels.inputs import Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# what fp32 sums in whatever order make of an error, and a GPU's exp2, log2 and reciprocal, each good to about 2^-22
FP32_ERROR = 2e-6
# relative Frobenius errors of bf16 operands and states
BF16_CEILING = dict(zip(NAMES, (3e-3, 3e-3, 4e-3, 4e-3, 3e-3, 4e-3, 3e-3), strict=True))


def triton_op(q, f, v, lower_bound, *, initial_state=None, output_final_state=True, cu_seqlens=None, save_states=False):
    """The kernels behind chunk_hgrn2's call, which on a CPU would choose PyTorch."""
    scale = q.shape[-1] ** -0.5
    inputs = Inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale)
    return torch_ops.chunk(inputs, output_final_state, save_states)


def on_device(inputs, dtype=torch.float32):
    """Projections in dtype, bound and state in fp32."""
    q, f, v, b, h0 = (x if x is None else x.to(DEVICE) for x in inputs)
    return [*(x.to(dtype) for x in (q, f, v)), *(x if x is None else x.float() for x in (b, h0))]


def check(inputs, cu_seqlens=None):
    """Against the recurrence in fp64: every tensor under its ceiling, and within twice the error of the roundings."""
    dtype, lower_bound = inputs[0].dtype, inputs[3]
    config = chunk_plan.Config.of(dtype, inputs[0].shape[-1], inputs[2].shape[-1])
    roundings = partial(twin, dtype=config.dtype, C=config.C)
    gold = run(recurrent_hgrn2, inputs, cu_seqlens, dtype=torch.float64)
    runs = [run(op, inputs, cu_seqlens) for op in (triton_op, roundings)]
    for name in NAMES:
        if gold[name] is None:
            continue
        keep = lower_bound >= 1e-3 if name == "dlower_bound" else ...
        # fp16 has no numbers for the gradients of closed gates
        want = gold[name].to(runs[0][name].dtype) if dtype == torch.float16 else gold[name]
        assert runs[0][name].isfinite().all(), name
        error, allowed = (relative_error(x[name][keep], want[keep]) for x in runs)
        ceiling = CEILING[dtype] if dtype == torch.float32 else BF16_CEILING[name]
        assert error <= min(ceiling, max(2 * allowed, FP32_ERROR)), (name, error, allowed)


@pytest.mark.parametrize("gate", ALL_GATES)
def test_fp32_is_the_recurrence_for_any_gate(gate):
    check(on_device(make_inputs((1, 70, 2, 32, 16), gate, "half-zero", dtype=torch.float32)))


@pytest.mark.parametrize(("most", "expected"), [(1, [1, 5, 5, 5, 5]), (4, [1, 2, 4, 5, 5])], ids=str)
def test_a_chunk_has_as_many_bands_as_its_gates_need(most, expected, monkeypatch):
    """Five chunks of 32 tokens whose gates, of one strength each, decay by 1, 2, 4, 8 and 16 powers of two a token."""
    in_fp32(most, monkeypatch)
    log2_gate = torch.tensor([-1.0, -2, -4, -8, -16], dtype=torch.float64).repeat_interleave(32)
    # a 16-channel block of which one channel is so strong
    f = torch.full((1, 160, 1, 16), 6.0)
    f[0, :, 0, 5] = torch.logit(log2_gate.exp2()).float()
    q, _, v, _, _ = make_inputs((1, 160, 1, 16, 16), dtype=torch.float32)
    *_, bands = torch.ops.hgrn2.chunk(*(x.to(DEVICE) for x in (q, f, v)), None, None, None, 1.0, True, True)
    assert bands.flatten().tolist() == expected


@pytest.mark.parametrize("gate", ["times-4", "half-closed"])
def test_bands_are_the_recurrence_too(gate, monkeypatch):
    """The banded form in fp32. Its error is larger than elsewhere, because its exponents are rounded to 2^-13."""
    in_fp32(4, monkeypatch)
    inputs = on_device(make_inputs((1, 70, 2, 32, 16), gate, "half-zero", dtype=torch.float32))
    gold, got = run(recurrent_hgrn2, inputs, dtype=torch.float64), run(triton_op, inputs)
    assert_equal(got, gold, 1e-4, inputs[3])


def in_fp32(most, monkeypatch):
    """Let fp32 take up to that many bands."""
    if DEVICE == "cuda" and most > 1:
        pytest.skip("compiled kernels keep their constants; on a GPU 16-bit inputs have bands")
    monkeypatch.setattr(triton_math, "BANDS_FP32", triton_math.tl.constexpr(most))


@pytest.mark.parametrize("bound", ["none", "zero", "learned"])
def test_fp32_with_every_kind_of_bound(bound):
    check(on_device(make_inputs((2, 40, 1, 16, 32), "times-16", bound, dtype=torch.float32)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 16), (2, 33, 1, 40, 24), (1, 64, 1, 96, 80)], ids=str)
def test_fp32_for_lengths_and_head_dimensions_that_nothing_divides(shape):
    check(on_device(make_inputs(shape, "closed-now-and-then", dtype=torch.float32)))


def test_fp32_packed_sequences():
    borders = [0, 0, 5, 37, 38, 38, 75]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
    inputs = make_inputs((1, 75, 2, 24, 16), "mixed", "half-zero", N=len(borders) - 1, dtype=torch.float32)
    check(on_device(inputs), cu_seqlens)


@pytest.mark.parametrize("T", [24 * 32, 25 * 32 + 5], ids=str)
def test_a_long_sequence_is_cut_into_segments(T, monkeypatch):
    monkeypatch.setattr(chunk_plan, "FILL", 3)
    inputs = on_device(make_inputs((1, T, 1, 16, 16), "over-16", dtype=torch.float32))
    assert chunk_triton.Launches(*inputs[:4], 1.0, None).plan.segments.per_sequence == 3
    check(inputs)


def test_a_segment_that_no_state_leaves_is_not_walked(monkeypatch):
    """The same bits where no final state is wanted, with one segment of each sequence less in the pass over them."""
    monkeypatch.setattr(chunk_plan, "FILL", 6)
    programs = []
    launch = chunk_triton.Launch.__call__

    def record(self, *tensors):
        if "LENGTH" in self.jitted.arg_names:
            programs.append(self.grid[0])
        launch(self, *tensors)

    monkeypatch.setattr(chunk_triton.Launch, "__call__", record)
    q, f, v, b, _ = on_device(make_inputs((2, 25 * 32 + 5, 1, 16, 16), "over-16", dtype=torch.float32))
    do, results = torch.randn_like(v), []
    for initial in (v.new_zeros(2, 1, 16, 16), None):
        inputs = Inputs(q, f, v, b, initial, None, 1.0)
        o, _, saved = chunk_triton.chunk_forward(inputs, initial is not None, save_states=True)
        results.append((o, *chunk_triton.chunk_backward(do, None, inputs, saved)[:4]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    # two sequences of three segments: the pass over the segments, the states, and both in reverse
    assert programs == [6, 6, 6, 6, 4, 6, 4, 6]


@pytest.mark.parametrize("borders", [[0, 0, 800, 803, 1100], [0, 1100]], ids=str)
def test_long_packed_sequences_are_cut_into_segments(borders, monkeypatch):
    monkeypatch.setattr(chunk_plan, "FILL", 12)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
    inputs = on_device(make_inputs((1, 1100, 1, 16, 16), "over-16", N=len(borders) - 1, dtype=torch.float32))
    assert chunk_triton.Launches(*inputs[:4], 1.0, cu_seqlens).plan.segments.count > len(borders)
    check(inputs, cu_seqlens)


def test_parts_of_one_fused_projection_in_megatrons_layout():
    T, B, H, K = 20, 2, 2, 16
    torch.manual_seed(0)
    fused = torch.randn(T, B, H, 3, K, device=DEVICE)
    views = fused.transpose(0, 1).unbind(3)
    assert not any(x.is_contiguous() for x in views)
    b = bounds("learned", H, K).float().to(DEVICE)
    strided, _ = triton_op(*views, b)
    contiguous, _ = triton_op(*(x.contiguous() for x in views), b)
    assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("save_states", [False, True])
def test_one_projection_and_its_gradient_in_one_piece(save_states):
    T, B, H, K = 20, 2, 2, 16
    torch.manual_seed(0)
    qfv = torch.randn(T, B, H, 3, K, device=DEVICE)
    b, do = bounds("learned", H, K).float().to(DEVICE), torch.randn(T, B, H, K, device=DEVICE).transpose(0, 1)
    fused, apart = (qfv.clone().requires_grad_() for _ in range(2))
    o, final_state = torch_ops.chunk_fused(fused.transpose(0, 1), b, None, None, 0.25, True, save_states)
    want, want_state = torch_ops.chunk(Inputs(*apart.transpose(0, 1).unbind(3), b, None, None, 0.25), True, save_states)
    for x in (o, want):
        x.backward(do)
    assert torch.equal(o, want) and torch.equal(final_state, want_state) and torch.equal(fused.grad, apart.grad)
    # as Megatron keeps activations: no copy on the way in or out
    assert o.transpose(0, 1).is_contiguous() and fused.grad.is_contiguous()


def test_bound_and_state_may_lie_apart_in_memory():
    q, f, v, b, h0 = on_device(make_inputs((1, 40, 2, 16, 16), dtype=torch.float32))
    together = triton_op(q, f, v, b, initial_state=h0)
    apart = triton_op(q, f, v, b.T.contiguous().T, initial_state=h0.mT.contiguous().mT)
    assert all(torch.equal(x, y) for x, y in zip(together, apart, strict=True))


def test_no_state_in_or_out():
    q, f, v, b, _ = on_device(make_inputs((1, 50, 1, 16, 16), dtype=torch.float32))
    q.requires_grad_()
    o, _ = triton_op(q, f, v, b)
    o.sum().backward()
    gold = recurrent_hgrn2(*(x.double() for x in (q, f, v, b)))[0]
    assert relative_error(o, gold) <= CEILING[torch.float32] and q.grad.isfinite().all()


@pytest.mark.parametrize("save_states", [False, True])
def test_activation_checkpointing(save_states):
    inputs = on_device(make_inputs((1, 40, 1, 16, 16), dtype=torch.float32))
    op = partial(triton_op, save_states=save_states)
    want = run(op, inputs)
    got = run(lambda *x, **options: checkpoint(op, *x, use_reentrant=False, **options), inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("save_states", [False, True])
@pytest.mark.parametrize("options", ["bare", "everything", "packed"])
def test_registered_with_torch(options, save_states):
    """Schema, fake tensors, autograd registration and tracing, as torch checks them."""
    q, f, v, b, h0 = on_device(make_inputs((1, 34, 1, 16, 16), dtype=torch.float32))
    # lengths that need as many chunks as can be: states of unused chunks hold anything, which would compare unequal
    cu_seqlens = torch.tensor([0, 1, 34], dtype=torch.int32, device=DEVICE) if options == "packed" else None
    if options == "bare":
        b = h0 = None
    if options == "packed":
        h0 = None
    leaves = [x if x is None else x.requires_grad_() for x in (q, f, v, b, h0)]
    torch.library.opcheck(torch.ops.hgrn2.chunk.default, (*leaves, cu_seqlens, 0.25, save_states, True))


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_kept_for_the_backward_changes_no_bit(cut, monkeypatch):
    """All states; those that enter segments; nothing but the inputs."""
    monkeypatch.setattr(chunk_plan, "FILL", 3 if cut else 1)
    inputs = on_device(make_inputs((1, 800, 1, 16, 16), "mixed", dtype=torch.float32))
    own = sum(x.nbytes for x in inputs)

    def run_and_weigh(save_states):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            result = run(partial(triton_op, save_states=save_states), inputs)
        return result, sum(x.nbytes for x in saved)

    everything, most = run_and_weigh(True)
    some, more = run_and_weigh(False)
    assert own + 25 * 16 * 16 * 4 <= most
    assert own < more <= 1.1 * own if cut else more == own
    monkeypatch.setattr(chunk_plan, "ENTERING_SHARE", 0)
    chunk_plan._plan.cache_clear()
    nothing, least = run_and_weigh(False)
    chunk_plan._plan.cache_clear()
    assert least == own
    for name in everything:
        assert torch.equal(everything[name], some[name]) and torch.equal(everything[name], nothing[name])


@pytest.mark.parametrize(("H", "kept"), [(16, True), (4, True), (1, False)])
def test_little_is_kept_beyond_the_inputs(H, kept):
    """At one sequence of 32768 tokens, which is cut into the more segments the fewer heads there are."""
    x = torch.empty(1, 32768, H, 128, dtype=torch.bfloat16, device="meta")
    plan = chunk_plan._plan(torch.device(DEVICE), x.dtype, x.shape, 128, x.stride(), x.stride(), True, 1.0, None, 256)
    assert plan.segments.cut and plan.keeps_entering == kept
    assert not kept or plan.segments.count * H * 128 * 128 * 4 <= 0.1 * 3 * x.nbytes


@pytest.mark.parametrize("packed", [False, True])
# programs that ask for whole sequences, and for sequences in segments
@pytest.mark.parametrize("fill", [1, 64])
@pytest.mark.parametrize("gate", ["over-16", "closed-now-and-then"])
def test_shard_states(gate, packed, fill, monkeypatch):
    """State and decay of whole sequences, and every gradient, against PyTorch in fp64."""
    monkeypatch.setattr(chunk_plan, "FILL", fill)
    N = 4 if packed else 2
    cu_seqlens = torch.tensor([0, 0, 300, 301, 800], dtype=torch.int32, device=DEVICE) if packed else None
    _, f, v, b, _ = on_device(make_inputs((1 if packed else 2, 800, 1, 16, 16), gate, "half-zero", dtype=torch.float32))
    torch.manual_seed(1)
    weights = torch.randn(N, 1, 16, 16, device=DEVICE), torch.randn(N, 1, 16, device=DEVICE)
    results = []
    monkeypatch.setattr(op, "implementation", kernels_but_in_fp64)
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (f, v, b)]
        outputs = shard_states(*leaves, cu_seqlens=cu_seqlens)
        torch.autograd.backward(outputs, [w.to(dtype) for w in weights])
        results.append([*(x.detach() for x in outputs), *(x.grad for x in leaves)])
    for name, got, want in zip(("state", "log_decay", "df", "dv", "dlower_bound"), *results, strict=True):
        keep = b >= 1e-3 if name == "dlower_bound" else ...
        if name == "log_decay" and gate == "closed-now-and-then":
            # the kernels' logs end where fp32 does: what they leave of a state is the same nothing
            got, want = got.exp(), want.exp()
        assert relative_error(got[keep], want[keep]) <= CEILING[torch.float32], name


def kernels_but_in_fp64(device, dtype):
    return "pytorch" if dtype == torch.float64 else "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_on_the_gpu(dtype, gate):
    check(on_device(make_inputs((2, 150, 3, 128, 128), gate, "half-zero"), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 32, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_head_dimension_on_the_gpu(dtype, D):
    check(on_device(make_inputs((1, 130, 2, D, D), "mixed", "half-zero"), dtype))


@pytest.mark.gpu
def test_same_bits_in_two_runs():
    inputs = on_device(make_inputs((2, 300, 4, 128, 128), "mixed"), torch.bfloat16)
    first, second = run(triton_op, inputs), run(triton_op, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
