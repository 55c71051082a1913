"""How processes divide the work of a run, by name, and the flags of Megatron that say so."""

import re
from dataclasses import dataclass

from pretrain import ATTENTION, GRAPH, HGRN2

HYBRID = "hybrid"
NAMES = [HGRN2, HYBRID, ATTENTION]
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
ONE = "one"
LAYOUTS = [ONE, "one, micro-batch 1", "DP2", "DP4", "DP8", "DP2 weak", "DP4 weak", "DP8 weak"]
LAYOUTS += ["TP2 SP", "TP2 SP, overlapped", "TP4 SP", "TP8 SP", "PP2", "PP2 VPP2", "PP4 VPP2", "CP2", "CP4", "CP8"]
LAYOUTS += ["TP2 PP2", "TP2 CP2", "TP2 CP4", "TP2 PP2 CP2", "TP2 PP2 DP2", "TP2 PP2 DP2 weak"]
# of GPUs, whose hosts keep up with these, and which have as many tokens of a micro-batch under TP and CP as one alone
GPU_LAYOUTS = [ONE, "one, micro-batch 1", "one, graph", "DP2 weak", "DP4 weak", "DP8 weak"]
GPU_LAYOUTS += ["TP2 SP, graph, micro-batch 8", "TP2 SP, overlapped, graph, micro-batch 8"]
GPU_LAYOUTS += ["TP4 SP, graph, micro-batch 16", "TP8 SP, graph, micro-batch 32"]
GPU_LAYOUTS += ["PP2 VPP2, graph", "PP2 VPP2 weak, graph", "PP4 VPP2, graph", "PP4 VPP2 weak, graph"]
GPU_LAYOUTS += ["CP2, graph, micro-batch 8", "CP4, graph, micro-batch 16", "CP8, graph, micro-batch 32"]
GPU_LAYOUTS += ["TP2 PP2, graph, micro-batch 8", "TP2 CP2, graph, micro-batch 16", "TP2 CP4, graph, micro-batch 32"]
GPU_LAYOUTS += ["TP2 PP2 CP2, graph, micro-batch 16", "TP2 PP2 DP2, graph, micro-batch 8"]
GPU_LAYOUTS += ["TP2 PP2 VPP2 DP2 weak, graph, micro-batch 8"]
# what may follow a layout's words, as "micro-batch 8" may -> flags
VARIANTS = {
    "overlapped": "--tp-comm-overlap --tp-comm-bootstrap-backend nccl",
    "graph": " ".join(GRAPH),
    "graphs of layers": "--cuda-graph-impl local",
}


@dataclass(frozen=True)
class Layout:
    """How processes divide the work, by its name: "one", "TP2 PP2 VPP2", "DP4 weak", "TP2 SP, graph, micro-batch 8"."""

    name: str
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    weak: bool = False
    variants: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str) -> "Layout":
        words, *variants = name.split(", ")
        sizes, others = {}, set()
        for word in words.split():
            if found := re.fullmatch(r"(TP|CP|PP|VPP|DP)(\d+)", word):
                sizes[found[1].lower()] = int(found[2])
            else:
                others.add(word)
        known = all(variant in VARIANTS or re.fullmatch(r"micro-batch \d+", variant) for variant in variants)
        if not (others <= {ONE, "SP", "weak"} and known):
            raise SystemExit(f"no layout {name!r}: one of {'; '.join(LAYOUTS)}, or such with other numbers")
        return cls(name, weak="weak" in others, variants=tuple(variants), **sizes)

    @property
    def processes(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def batch(self, of_one: int) -> int:
        """Sequences of an iteration, where one process has so many."""
        return of_one * self.processes if self.weak else of_one

    def flags(self, of_one: int) -> list[str]:
        flags = f"--tensor-model-parallel-size {self.tp} --context-parallel-size {self.cp} "
        flags += f"--pipeline-model-parallel-size {self.pp}"
        for variant in self.variants:
            flags += " " + (VARIANTS.get(variant) or variant.replace("micro-batch", "--micro-batch-size"))
        if self.tp > 1:
            flags += " --sequence-parallel"
        if self.vpp > 1:
            flags += f" --num-virtual-stages-per-pipeline-rank {self.vpp}"
        if self.dp * self.cp > 1:
            flags += f" {OVERLAP}"
        if self.weak:
            flags += f" --global-batch-size {self.batch(of_one)}"
        return flags.split()


@dataclass(frozen=True)
class Row:
    """One run; with a length it is of the sweep."""

    model: str
    layout: Layout
    length: int | None = None

    @classmethod
    def named(cls, name: str, sweep: bool) -> "Row":
        model, _, layout = name.partition(", ")
        layout, _, length = layout.rpartition(", ") if sweep else (layout, "", "")
        if model not in NAMES or sweep != length.isdecimal():
            raise SystemExit(f"no row {name!r}: write 'HGRN2, TP2 SP', or 'HGRN2, CP2, 4096' for the sweep")
        return cls(model, Layout.named(layout), int(length) if sweep else None)

    @property
    def name(self) -> str:
        return ", ".join([self.model, self.layout.name, *([str(self.length)] if self.length else [])])

    def impossible_without_gpu(self) -> str:
        """Why the row needs a GPU, or nothing."""
        if "overlapped" in self.layout.variants:
            return "--tp-comm-overlap is of Transformer Engine, which needs a GPU"
        if any("graph" in variant for variant in self.layout.variants):
            return "CUDA graphs need a GPU"
        if self.layout.cp > 1 and self.model != HGRN2:
            return "Megatron's own attention takes no context parallelism, and Transformer Engine's needs a GPU"
        return ""
