"""Pictures of the runs of scaling.py, and of the sweeps of operator_times.py."""

import json
from collections.abc import Callable
from pathlib import Path

import report
from figures import Figures
from layouts import Row


def bars(figures: dict[str, Figures], rows: list[Row], plt):
    """Draw a bar for each layout, with one colour for each model."""
    done = [row for row in rows if row.name in figures]
    layouts = list(dict.fromkeys(row.layout.name for row in done))
    models = list(dict.fromkeys(row.model for row in done))
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.35 * len(layouts)), sharey=True)
    for i, model in enumerate(models):
        of_model = [row for row in done if row.model == model]
        found = [figures[row.name] for row in of_model]
        height = 0.8 / len(models)
        places = [layouts.index(row.layout.name) + (i - (len(models) - 1) / 2) * height for row in of_model]
        axes[0].barh(places, [x.rate for x in found], height, label=model)
        axes[1].barh(places, [x.sent for x in found], height)
    axes[0].set_yticks(range(len(layouts)), layouts)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("tokens/s per GPU")
    axes[1].set_xlabel("MiB that rank 0 sends in a step")
    axes[0].legend()
    return figure


def lines(figures: dict[str, Figures], rows: list[Row], plt):
    """Draw lines against length, with one colour for each model and one marker for each CP."""
    done = [row for row in rows if row.name in figures]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    models, layouts = (list(dict.fromkeys(x)) for x in zip(*((r.model, r.layout.name) for r in done), strict=True))
    lengths = sorted({row.length for row in done})
    for model, layout in dict.fromkeys((row.model, row.layout.name) for row in done):
        found = {r.length: figures[r.name] for r in done if (r.model, r.layout.name) == (model, layout)}
        look = dict(color=f"C{models.index(model)}", marker="osD^v<>"[layouts.index(layout) % 7])
        axes[0].plot(list(found), [x.rate for x in found.values()], **look)
        axes[1].plot(list(found), [x.peak for x in found.values()], label=f"{model}, {layout}", **look)
    for axis, label in zip(axes, ("tokens/s per GPU", "peak GiB per GPU"), strict=True):
        axis.set(xscale="log", xlabel="tokens of the sequence", ylabel=label, ylim=(0, None))
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def save(draw: Callable, figures: dict[str, Figures], rows: list[Row], path: Path):
    """Draw the rows that have figures into a file. `draw` is `bars` or `lines`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(figures, rows, plt)
    figure.suptitle(report.machine(), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def of_operator(data: str, picture: str):
    """Draw the sweeps in a file of results of operator_times.py into a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = json.loads(Path(data).read_text())["sweeps"]
    if not sweeps:
        raise SystemExit(f"{data} has no sweeps: run this benchmark with --sweeps --out {data}")
    figure, axes = plt.subplots(1, len(sweeps), figsize=(5.5 * len(sweeps), 4), squeeze=False)
    for axis, (name, rows) in zip(axes[0], sweeps.items(), strict=True):
        of = 1 if name.startswith("length") else 2
        x = sorted({int(row["shape"].split("x")[of]) for row in rows})
        for operator, label in (("HGRN2", "HGRN2"), ("attention", "attention (cuDNN)")):
            times = [row["forward + backward ms"] for row in rows if row["operator"] == operator]
            axis.plot(x, times, "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="forward + backward, ms", xticks=x)
        axis.set_xticks(x, [str(n) for n in x])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
