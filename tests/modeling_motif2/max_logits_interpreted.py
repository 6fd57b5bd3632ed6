"""The kernel of maximum logits in Triton's interpreter; `tests/kernels_hub/test_interpreter.py` runs this file."""

import pytest

from modeling_motif2 import max_logits
from tests.modeling_motif2.test_max_logits import CASES, GATES, SMALL_CASES, check


@pytest.mark.parametrize("case", SMALL_CASES + [pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=str)
def test_kernel(monkeypatch, case):
    calls = []
    launch = max_logits._launch
    monkeypatch.setattr(max_logits, "_launch", lambda *arguments: calls.append(1) or launch(*arguments))
    check(*case)
    assert len(calls) == len(GATES)
