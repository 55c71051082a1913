"""One rank of forwards without gradients over context parallel ranks, each compared with the whole batch on one rank.

torchrun ... inference.py
    Rank 0 prints a line for each case; the first that differs ends the run.

The ranks' own CP group deals every batch out; with a local_cp_size of 1 the same model takes it as a whole.
"""

import argparse
import tempfile

import harness
import torch
import worker
from megatron.core.packed_seq_params import PackedSeqParams
from reference_attention import own_tokens

MODES = {"no-grad": torch.no_grad, "inference-mode": torch.inference_mode, "gradients": torch.enable_grad}
TURNS = [
    ("no-grad", "inference-mode"),
    ("inference-mode", "no-grad"),
    ("inference-mode", "gradients"),
    ("gradients", "inference-mode"),
]
# tokens of each rank that lie behind the last document
BEHIND = 3
# other borders of as many documents and tokens
OTHERS = {"documents": [0, 16, 24, 32, 40], "stream": [0, 2, 3, 9, 25, 36, 40]}


def report(*words: str):
    if torch.distributed.get_rank() == 0:
        print("same:", *words, flush=True)


def params_of(borders: list[int], **options) -> PackedSeqParams:
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, **options)


def assert_same(model, tokens, layout: str | None, borders: list[int] | None, params, behind: int = 0, group=None):
    """Compare the logits of this rank's tokens, and gradients, with those of them in the whole batch."""
    group = group or torch.distributed.group.WORLD
    places = own_tokens(tokens.shape[1], borders, layout, group.rank(), group.size())
    own = torch.cat([tokens[:, places], tokens[:, :behind]], 1)
    logits = model(own, None, None, packed_seq_params=params)[:, : len(places)]
    whole = params_of(borders or [0, tokens.shape[1]], local_cp_size=1)
    want = torch.cat([model(row[None], None, None, packed_seq_params=whole) for row in tokens])
    torch.testing.assert_close(logits, want[:, places], rtol=1e-4, atol=1e-4)
    if logits.requires_grad:
        # of documents that the ranks share, each has a part
        found, expected = (_gradients(model, x) for x in (logits, want[:, places]))
        harness.assert_all_close(found, expected, tolerance=1e-5)


def _gradients(model, logits) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(logits.square().sum(), parameters)
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    return dict(zip(names, gradients, strict=True))


def main():
    harness.start_megatron(cpu_mode=True)
    import parity

    worker.move_short_documents()
    cp = torch.distributed.get_world_size()
    meeting = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(meeting)
    parity.start_layout({"cp": cp}, f"{meeting[0]}/meeting")

    def build(layout):
        model = harness.build_model(num_layers=2, context_parallel_size=cp, hgrn2_packed_layout=layout)
        model.load_state_dict(harness.full_weights(model), strict=False)
        return model

    tokens, _ = harness.batch()
    model = build(None)
    for mode in ("no-grad", "inference-mode"):
        with MODES[mode]():
            assert_same(model, tokens, None, None, None)
        report("batch", mode)

    for layout, (borders, _) in worker.PACKINGS.items():
        model = build(layout)
        for first, second in TURNS:
            for inside in (False, True):
                # PyTorch itself keeps no tensor of inference mode for a backward
                if (inside, first, second) == (True, "inference-mode", "gradients"):
                    continue
                given = None if inside else params_of(borders)
                with MODES[first]():
                    given = given or params_of(borders)
                    assert_same(model, tokens[:1], layout, borders, given)
                with MODES[second]():
                    assert_same(model, tokens[:1], layout, borders, given)
                # the next batch in the same tensor
                with torch.inference_mode(given.cu_seqlens_q.is_inference()):
                    given.cu_seqlens_q.copy_(torch.tensor(OTHERS[layout]))
                with MODES[second]():
                    assert_same(model, tokens[:1], layout, OTHERS[layout], given)
                report(layout, first, second, "inside" if inside else "outside")

    # tokens behind the last document: nobody's, or one document more of a stream; and documents without a token
    borders, _ = worker.PACKINGS["documents"]
    assert_same(build("documents"), tokens[:1], "documents", borders, params_of(borders), behind=BEHIND)
    for layout, borders in (("stream", [0, 1, 3, 5, 25, 26]), ("documents", [0, 8, 8, 8, 24, 24, 32, 40, 40])):
        assert_same(build(layout), tokens[:1], layout, borders, params_of(borders))
    report("behind")

    # a batch with ranks of its own, which Megatron cuts as a stream whatever the others are
    borders, _ = worker.PACKINGS["stream"]
    for size in {2, cp}:
        groups = [torch.distributed.new_group(range(first, first + size)) for first in range(0, cp, size)]
        group = groups[torch.distributed.get_rank() // size]
        for layout in ("documents", None):
            params = params_of(borders, cp_group=group, local_cp_size=size)
            assert_same(build(layout), tokens[:1], "stream", borders, params, group=group)
    report("own ranks")

    # where the config is silent, Megatron's command line says how they are dealt out
    import megatron.training.global_vars as global_vars

    for flag, layout in (("sft", "documents"), ("dataloader_inter_document_masking", "stream")):
        global_vars._GLOBAL_ARGS = argparse.Namespace(**{flag: True})
        borders, _ = worker.PACKINGS[layout]
        assert_same(build(None), tokens[:1], layout, borders, params_of(borders))
        report(flag)


if __name__ == "__main__":
    main()
