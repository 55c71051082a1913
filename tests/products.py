"""Draw products of parallelisms at random, because faults hide in products that no list of cases names.

    PRODUCTS=3 python -m pytest -p no:xdist tests/parallel/test_parity.py -k product

PRODUCTS is a seed. Each seed draws 14 models with a layout of 4 or 8 processes, which takes a few minutes on two cores.
"""

import random

from parity import CHUNKED, DISTRIBUTED, RECOMPUTE, SELECTIVE

# The number of layers in each virtual stage of a HybridModel. A GPT has None, because Megatron divides its layers. The
# other models have no virtual stages here.
VIRTUAL = {"stack": [2, 3, 1, 2], "stack-pure": [2, 3, 1, 2], "stack-deep": [4, 4, 4, 4]}
VIRTUAL |= dict.fromkeys(("hgrn2", "hybrid", "tied", "per-token-loss", "experts", "packed-documents", "packed-stream"))
MODELS = [*VIRTUAL, "mtp", "mtp-attention", "stack-experts", "packed-hybrid-documents", "packed-hybrid-stream"]


def draw(seed: int, count: int = 14) -> dict[tuple[str, str], tuple[int, dict]]:
    """Return the number of processes and the layout of each product, by the names of the model and of the layout.

    Args:
        seed: number of the draw.
        count: number of products.
    """
    chance, found = random.Random(seed), {}
    while len(found) < count:
        model, processes = chance.choice(MODELS), chance.choice([4, 8])
        sizes = {name: 2 for name in ("tp", "pp", "cp") if chance.random() < 0.5}
        dp = processes // 2 ** len(sizes)
        if sizes and dp:
            name, layout = _layout(chance, model, sizes, dp)
            # the number makes the name unique
            found[model, f"product-{len(found)}-{name}-on-{processes}"] = processes, layout
    return found


def _layout(chance: random.Random, model: str, sizes: dict, dp: int) -> tuple[str, dict]:
    """Return the name of a layout and the layout itself."""
    layout, config, words = dict(sizes), {}, [f"{name}2" for name in sizes]

    def add(word: str, probability: float, to: dict, settings: dict):
        if chance.random() < probability:
            words.append(word)
            to |= settings

    experts = "experts" in model
    if experts and dp > 1:
        add("ep2", 0.7, layout, {"ep": 2})
    if "tp" in sizes:
        # Megatron's experts demand it
        add("sequence-parallel", 1 if experts else 0.6, layout, {"sequence_parallel": True})
    if dp > 1:
        add("distributed-optimizer", 0.7, layout, DISTRIBUTED)
    # with data parallelism, a rank has too few micro-batches for virtual stages
    if "pp" in sizes and dp == 1 and model in VIRTUAL:
        segments = VIRTUAL[model]
        add("vpp2", 0.5, layout, {"vpp": 2} | ({"segments": segments} if segments else {}))
    recompute, settings = chance.choice([("full", RECOMPUTE), ("selective", SELECTIVE)])
    add(f"recompute-{recompute}", 0.5, config, settings)
    if not experts:
        add("loss-by-chunks", 0.3, config, CHUNKED)
    return "-".join(words), layout | ({"config": config} if config else {})
