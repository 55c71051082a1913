"""The models for transformers beside fla's, where fla is installed."""

import re

import harness
import pytest
from hf_models import MODELS


def test_folders_and_logits_are_flas(tmp_path):
    pytest.importorskip("fla", reason="needs fla: pip install flash-linear-attention")
    done = harness.python("tests/hf/beside_fla.py", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    errors = re.findall(r"^(.+): (\S+)$", done.stdout, re.M)
    errors = [(kind, float(error)) for kind, error in errors if kind in MODELS]
    assert {kind for kind, _ in errors} == set(MODELS)
    assert max(error for _, error in errors) < 1e-4
