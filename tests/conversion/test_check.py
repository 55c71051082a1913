"""The check of a conversion: it passes right conversions in every dtype, and refuses wrong ones."""

import harness
import plain_hgrn2
import pytest
import torch
from conversion_cases import (
    CONFIG,
    EXPAND,
    HYBRID,
    LAYERS,
    change,
    convert,
    convert_checked,
    hf_weights,
    with_mtp_head,
    write_hf,
)

from hgrn2_megatron import UsageError
from hgrn2_megatron.conversion import check, command
from hgrn2_megatron.conversion.config import megatron_args

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "norms in fp32": torch.bfloat16}


@pytest.mark.releases
def test_the_check_knows_right_from_wrong_in_every_dtype(tmp_path):
    """Each dtype of the source, each --dtype, both directions: 0 for a right conversion, 2 for two matrices swapped."""
    there, back = [], []
    for kept, dtype in DTYPES.items():
        config = CONFIG | HYBRID | {"use_lower_bound": kept != "fp16"}
        weights = hf_weights(config, dtype)
        if kept == "norms in fp32":
            weights |= {name: x for name, x in hf_weights(config).items() if "norm" in name}
        source = write_hf(tmp_path / kept, weights, **config)
        there.append(((source, tmp_path / f"{kept} there"), False))
        for flags in ((), ("--dtype", "bf16"), ("--dtype", "fp32")):
            for wrong in (False, True):
                name = f"{kept} {flags} {wrong}"
                there.append(((source, tmp_path / f"to {name}", *flags), wrong))
                back.append(((tmp_path / f"{kept} there", tmp_path / f"from {name}", *flags), wrong))
    main = convert(write_hf(tmp_path / "hf", **HYBRID), tmp_path / "main")
    heads = change(main, tmp_path / "heads", with_mtp_head)
    back.append(((heads, tmp_path / "without heads", "--drop-mtp-heads"), False))
    convert_checked([*there, *back])


def test_the_forward_of_the_check_is_that_of_the_independent_implementation():
    weights = hf_weights(CONFIG)
    tokens = torch.randint(130, (2, 12), generator=torch.Generator().manual_seed(2))
    ours = check.hf_logits(megatron_args(CONFIG), weights.__getitem__, tokens)
    harness.assert_all_close({"logits": ours}, {"logits": plain_hgrn2.logits(weights, tokens, LAYERS, EXPAND)}, 1e-5)


def test_the_check_refuses_different_logits(tmp_path, monkeypatch):
    source = write_hf(tmp_path / "hf")
    monkeypatch.setattr(check, "megatron_logits", lambda folder, tokens, **_: torch.zeros(*tokens.shape, 256))
    with pytest.raises(UsageError, match="different models: logits"):
        command.main([str(source), str(tmp_path / "out")])
