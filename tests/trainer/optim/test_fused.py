"""The fused elementwise passes equal what they stand for: in torch, in Triton's interpreter, and on accelerators."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.optim.test_parallel_muon_clip import fsdp_on, single_result
from trainer.optim.fused import _fusable, apply_update, nesterov, not_finite, scale_rows


def inputs(numel: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    return [torch.randn(numel, generator=generator).to(device, dtype) for _ in range(3)]


def check(nesterov_function, update_function, device: str) -> None:
    """Values in float32, guards beyond the end untouched, low precision on the way out and in."""
    for numel in (1, 4095, 4096, 10001):
        gradient, momentum_buffer, weight = inputs(numel, device)
        expected_buffer = 0.9 * momentum_buffer + gradient
        out = torch.full((numel + 3,), torch.nan, dtype=torch.bfloat16, device=device)
        nesterov_function(gradient, momentum_buffer, 0.9, out[:numel])
        torch.testing.assert_close(momentum_buffer, expected_buffer, rtol=1e-6, atol=1e-6)
        expected_out = (gradient + 0.9 * expected_buffer).bfloat16()
        torch.testing.assert_close(out[:numel], expected_out, rtol=8e-3, atol=1e-6)
        assert out[numel:].isnan().all()
        nesterov_function(gradient, momentum_buffer, 0.9, None)
        torch.testing.assert_close(momentum_buffer, 0.9 * expected_buffer + gradient, rtol=1e-6, atol=1e-6)
        update = gradient.half()
        expected = 0.99 * weight - 0.5 * update.float()
        update_function(weight, update, 0.99, 0.5)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def check_rows(scale_rows_function, device: str) -> None:
    """Rows times their factors, and nothing beside them."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(7, 4099).to(device, dtype)
        factors = torch.tensor([0.5, 1.0, 1.5]).to(device)
        expected = weight.clone()
        expected[2:5] *= factors[:, None]
        scale_rows_function(weight[2:5], factors)
        tolerance = 0.0 if dtype == torch.float32 else 8e-3  # Triton's interpreter cuts where others round
        torch.testing.assert_close(weight, expected, rtol=tolerance, atol=0.0)


def check_finite(not_finite_function, device: str) -> None:
    """A bad value is found wherever it stands, and nothing else is taken for one."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.full((numel,), 3e38).to(device, dtype) for numel in (5, 9_001, 1, 0)]
        assert not_finite_function(tensors) == 0
        for tensor, place, value in ((0, 4, math.nan), (1, 9_000, math.inf), (1, 0, -math.inf), (2, 0, math.nan)):
            bad = [each.clone() for each in tensors]
            bad[tensor][place] = value
            assert not_finite_function(bad) == 1


def test_torch():
    check(nesterov, apply_update, "cpu")
    check_finite(lambda tensors: not_finite(tensors, torch.device("cpu")), "cpu")
    check_rows(scale_rows, "cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_types_that_kernels_do_not_take_go_to_torch(dtype):
    on_accelerator = {"is_contiguous": lambda: True, "is_cuda": True, "numel": lambda: 5}
    assert _fusable(SimpleNamespace(dtype=torch.bfloat16, **on_accelerator))
    assert not _fusable(SimpleNamespace(dtype=dtype, **on_accelerator))


@pytest.mark.gpu
def test_bad_values_are_found_in_any_type_and_place():
    device = torch.device("cuda")
    good = [torch.ones(5, device=device), torch.ones(5, dtype=torch.complex64, device=device), torch.ones(5)]
    assert not_finite(good, device) == 0
    for number in range(len(good)):
        bad = [each.clone() for each in good]
        bad[number][3] = math.inf
        assert not_finite(bad, device) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two accelerators")
def test_kernels_run_where_the_tensors_are():
    assert torch.cuda.current_device() == 0
    check(nesterov, apply_update, "cuda:1")
    check_finite(lambda tensors: not_finite(tensors, torch.device("cuda:1")), "cuda:1")


@pytest.mark.gpu
def test_triton():
    check(nesterov, apply_update, "cuda")
    check_finite(lambda tensors: not_finite(tensors, torch.device("cuda")), "cuda")
    check_rows(scale_rows, "cuda")


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two accelerators")
@pytest.mark.parametrize("method", ["gram", "classic"])
def test_two_accelerators_equal_one_bit_for_bit(method):
    expected = single_result(torch.float32, device="cuda", method=method)
    for result in run_distributed(fsdp_on, 2, 2, "cuda", method, backend="nccl"):
        for name, value in result.items():
            assert torch.equal(value, expected[name]), name
