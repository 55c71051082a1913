"""Layouts of processes by name, and the flags of Megatron that make them."""

import re
from dataclasses import dataclass

from models import GRAPH, HGRN2, MODELS, NAMES, WIDE, WIDTHS

OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FSDP = "--use-distributed-optimizer --use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
FSDP += "--ckpt-format fsdp_dtensor"
ONE = "one"
ALONE = [ONE, "one, micro-batch 1", "DP2", "DP4", "DP8", "DP2 weak", "DP4 weak", "DP8 weak"]
SPLIT = ["TP2 SP", "TP2 SP, overlapped", "TP4 SP", "TP8 SP", "CP2", "CP4", "CP8", "TP2 CP2", "TP2 CP4"]
SPLIT += ["PP2", "PP2 VPP2", "PP2 VPP2 weak", "PP4 VPP2", "PP4 VPP2 weak", "TP2 PP2", "TP2 PP2 CP2"]
SPLIT += ["TP2 PP2 DP2", "TP2 PP2 VPP2 DP2 weak", "TP2 PP2 VPP2 DP2 weak, overlapped"]
LAYOUTS = ALONE + SPLIT
# If each GPU has only a part of the work, it is faster than its host. So these layouts run in a CUDA graph.
GPU_LAYOUTS = [*ALONE, "one, graph", *(f"{layout}, graph" for layout in SPLIT)]
# a variant that may follow a layout -> its flags
VARIANTS = {
    "overlapped": "--tp-comm-overlap --tp-comm-bootstrap-backend nccl",
    "graph": " ".join(GRAPH),
    "graphs of layers": "--cuda-graph-impl local",
}


@dataclass(frozen=True)
class Layout:
    """A division of the work among processes.

    Its name gives all settings: "one", "TP2 PP2 VPP2", "DP4 weak", "DP4 FSDP", "TP2 SP, graph, micro-batch 8". In a
    weak layout, each process has the batch that one process alone has. With FSDP, Megatron-FSDP shards weights,
    gradients and the optimizer, in the place of the distributed optimizer.
    """

    name: str
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    weak: bool = False
    fsdp: bool = False
    micro_batch: int | None = None
    variants: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str) -> "Layout":
        """Return the layout with this name. An unknown name stops the program."""
        words, *more = name.split(", ")
        sizes, others, variants = {}, set(), []
        for word in words.split():
            if found := re.fullmatch(r"(TP|CP|PP|VPP|DP)(\d+)", word):
                sizes[found[1].lower()] = int(found[2])
            else:
                others.add(word)
        for variant in more:
            if found := re.fullmatch(r"micro-batch (\d+)", variant):
                sizes["micro_batch"] = int(found[1])
            else:
                variants.append(variant)
        if not (others <= {ONE, "SP", "weak", "FSDP"} and VARIANTS.keys() >= set(variants)):
            raise SystemExit(f"no layout {name!r}: use one of {'; '.join(LAYOUTS)}, or one of these with other numbers")
        if "FSDP" in others and {"tp", "pp"} & sizes.keys():
            # It cannot read the first weights, and each rank of tensor parallelism would draw others.
            raise SystemExit(f"no layout {name!r}: a row with FSDP has neither TP nor PP")
        return cls(name, weak="weak" in others, fsdp="FSDP" in others, variants=tuple(variants), **sizes)

    @property
    def processes(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def batch(self, of_one: int) -> int:
        """Return the number of sequences of an iteration. `of_one` is the number that one process alone has."""
        return of_one * self.processes if self.weak else of_one

    def flags(self, of_one: int, micro_batch: int) -> list[str]:
        """Return Megatron's flags of this layout.

        If the name gives no micro-batch, the micro-batch grows with TP and CP. Each process then has as many tokens at
        a time as one process alone.

        Args:
            of_one: number of sequences of an iteration on one process alone.
            micro_batch: number of sequences of a micro-batch on one process alone.
        """
        micro_batch = self.micro_batch or min(micro_batch * self.tp * self.cp, self.batch(of_one) // self.dp)
        flags = f"--micro-batch-size {micro_batch} --tensor-model-parallel-size {self.tp} "
        flags += f"--context-parallel-size {self.cp} --pipeline-model-parallel-size {self.pp}"
        for variant in self.variants:
            flags += f" {VARIANTS[variant]}"
        if self.tp > 1:
            flags += " --sequence-parallel"
        if self.vpp > 1:
            flags += f" --num-virtual-stages-per-pipeline-rank {self.vpp}"
        if self.dp * self.cp > 1:
            flags += f" {FSDP if self.fsdp else OVERLAP}"
        if self.weak:
            flags += f" --global-batch-size {self.batch(of_one)}"
        return flags.split()


@dataclass(frozen=True)
class Row:
    """One run of a model in a layout. A run of the sweep also has a length in tokens."""

    model: str
    layout: Layout
    length: int | None = None

    @classmethod
    def named(cls, name: str, sweep: bool) -> "Row":
        """Return the row with this name. An unknown name stops the program."""
        model, _, layout = name.partition(", ")
        layout, _, length = layout.rpartition(", ") if sweep else (layout, "", "")
        if model not in NAMES + WIDE or sweep != length.isdecimal():
            raise SystemExit(f"no row {name!r}: write 'HGRN2, TP2 SP', or 'HGRN2, CP2, 4096' for the sweep")
        return cls(model, Layout.named(layout), int(length) if sweep else None)

    @property
    def name(self) -> str:
        return ", ".join([self.model, self.layout.name, *([str(self.length)] if self.length else [])])

    @property
    def model_flags(self) -> list[str]:
        base, _, width = self.model.partition(" ")
        return [*MODELS[base][1], *WIDTHS[width]]

    def impossible_without_gpu(self) -> str:
        """Return the reason why the row needs a GPU, or "" if it runs without one."""
        if self.model in WIDE:
            return "a model of this width needs a GPU"
        if "overlapped" in self.layout.variants:
            return "--tp-comm-overlap belongs to Transformer Engine, which needs a GPU"
        if any("graph" in variant for variant in self.layout.variants):
            return "CUDA graphs need a GPU"
        if self.layout.cp > 1 and self.model != HGRN2:
            return "Megatron's own attention has no context parallelism, and Transformer Engine's needs a GPU"
        return ""
