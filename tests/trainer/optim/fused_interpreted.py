"""The fused elementwise kernels in Triton's interpreter; `tests/kernels_hub/test_interpreter.py` runs this file."""

import torch

from tests.trainer.optim.test_fused import check, check_finite, check_rows
from trainer.optim import fused_kernels


def test_kernels():
    check(fused_kernels.nesterov, fused_kernels.apply_update, "cpu")
    check_rows(fused_kernels.scale_rows, "cpu")


def test_bad_values_are_found(monkeypatch):
    monkeypatch.setattr(fused_kernels, "_PROGRAMS_A_TENSOR", 2)

    def not_finite(tensors):
        flag = torch.zeros(1)
        fused_kernels.mark_not_finite(tensors, flag)
        return flag

    check_finite(not_finite, "cpu")
