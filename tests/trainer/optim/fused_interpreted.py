"""The fused elementwise kernels in Triton's interpreter; `tests/kernels_hub/test_interpreter.py` runs this file."""

from tests.trainer.optim.test_fused import check
from trainer.optim import fused_kernels


def test_kernels():
    check(fused_kernels.nesterov, fused_kernels.apply_update, "cpu")
