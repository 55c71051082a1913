"""examples/pretrain_hybrid.py whose rank 0 keeps the tokens and labels of every micro-batch in the folder BATCHES.

A script for the launcher, not a test.
"""

import os
import sys
from pathlib import Path

import torch
from megatron.training.argument_utils import hybrid_config_from_args

sys.path.insert(0, "examples")
import pretrain_gpt

get_batch = pretrain_gpt.get_batch
taken = []


def get_and_keep(data_iterator):
    batch = get_batch(data_iterator)
    taken.append(batch)
    if os.environ["RANK"] == "0":
        kept = {name: batch[name] for name in ("tokens", "labels")}
        torch.save(kept, Path(os.environ["BATCHES"]) / f"{len(taken)}.pt")
    return batch


pretrain_gpt.get_batch = get_and_keep
pretrain_gpt.main(hybrid_config_from_args)
