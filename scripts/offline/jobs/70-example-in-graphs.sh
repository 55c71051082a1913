# Makes a copy of the checkout in which examples/pretrain_gpt.py does not broadcast its batch, so that a graph of the
# iteration can capture it. If a run in a graph then has the same losses as one without, make this change in the example.
# seconds: 5
# needs: base
cp -r . "$WORK/graphs"
cd "$WORK/graphs" || exit 1
python3 - <<'PROGRAM'
from pathlib import Path

path = Path("examples/pretrain_gpt.py")
text = path.read_text()
for old, new in (
    (
        '    batch = broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)\n'
        '    batch |= broadcast_data(["loss_mask"], data, torch.float32)\n',
        '    batch = {name: data[name].cuda(non_blocking=True) for name in ("tokens", "labels", "position_ids")}\n'
        '    batch["loss_mask"] = data["loss_mask"].cuda(non_blocking=True)\n',
    ),
    ('if args.cuda_graph_impl == "full_iteration":', "if args.tensor_model_parallel_size > 1:"),
):
    assert text.count(old) == 1, old
    text = text.replace(old, new)
path.write_text(text)
PROGRAM
