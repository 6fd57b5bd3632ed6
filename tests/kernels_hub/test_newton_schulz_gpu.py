"""The Newton-Schulz kernels on a CUDA device: odd shapes, both half types, full-size spectra, every tile choice."""

import itertools
from collections.abc import Callable

import pytest
import torch

from tests.kernels_hub.newton_schulz_cases import load_package, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

package = load_package()
LIMITS = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
SHAPES = [(1, 128, 64), (2, 5, 40), (1, 384, 8), (2, 333, 77), (3, 1000, 520), (2, 2048, 4096)]


@pytest.fixture
def kernels():
    from newton_schulz import triton_products

    return triton_products


def filled(kernels, value: Callable, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An aligned tensor of a shape with what `value(shape)` gives in it."""
    return kernels.aligned_empty(*shape, dtype, torch.device("cuda")).copy_(value(shape))


def poison(shape):
    return torch.full(shape, float("nan"))


def symmetric(shape):
    square = torch.randn(shape, device="cuda")
    return (square + square.mT) / 2


@pytest.mark.parametrize("wide", [128, 256])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symmetric_products(kernels, shape, dtype, wide):
    batch, size, _ = shape
    square = (batch, size, size)
    config = kernels.TileConfig(wide=wide)
    x = filled(kernels, torch.randn, *shape, dtype=dtype)
    gram = kernels.symmetric_product(x, out=filled(kernels, poison, *square, dtype=dtype), config=config)
    assert torch.equal(gram, gram.mT)
    assert relative_error(gram, x.double() @ x.double().mT) < LIMITS[dtype]
    a, d = (filled(kernels, symmetric, *square, dtype=dtype) for _ in range(2))
    out = filled(kernels, poison, *square, dtype=dtype)
    got = kernels.symmetric_product(a, a, d, 0.5, -2.0, 3.0, out=out, config=config)
    identity = torch.eye(size, device="cuda", dtype=torch.float64)
    assert torch.equal(got, got.mT)
    assert relative_error(got, 0.5 * a.double() @ a.double() - 2 * d.double() + 3 * identity) < LIMITS[dtype]
    alone = kernels.symmetric_product(a[-1:], a[-1:], d[-1:], 0.5, -2.0, 3.0, config=config)
    assert torch.equal(alone[0], got[-1])


@pytest.mark.parametrize("method", ["classic", "gram"])
@pytest.mark.parametrize("shape", [(96, 96), (333, 777), (520, 1000), (2048, 4096)], ids=str)
def test_passes(shape, method):
    matrices = torch.randn(3, *shape, device="cuda", dtype=torch.bfloat16)
    reference = package.newton_schulz(matrices.double(), "classic")
    got = package.newton_schulz(matrices, method)
    assert relative_error(got, reference) < 0.02
    assert torch.equal(got, package.newton_schulz(matrices, method))
    assert torch.equal(got[1], package.newton_schulz(matrices[1], method))
    assert relative_error(package.newton_schulz(matrices.mT, method).mT, reference) < 0.02
    assert relative_error(package.newton_schulz(matrices.mT.contiguous(), method).mT, reference) < 0.02
    assert package.newton_schulz(torch.zeros_like(matrices), method).count_nonzero() == 0


@pytest.mark.parametrize("method", ["classic", "gram"])
@pytest.mark.parametrize("shape", [(520, 1000), (4096, 16384)], ids=str)
def test_gate_up_and_down_are_as_alone(shape, method):
    rows, columns = shape
    parts = [torch.randn(2, columns, rows, device="cuda").bfloat16(), torch.randn(1, *shape, device="cuda").bfloat16()]
    alone = [package.newton_schulz(part, method) for part in parts]
    assert all(map(torch.equal, package.newton_schulz(parts, method), alone))


def test_the_gram_form_beats_the_classic_form_at_full_size():
    for power, (rows, columns) in itertools.product((0.0, 1.0), ((4096, 5120), (2048, 4096))):
        decay = torch.arange(1, rows + 1, device="cuda")[:, None] ** -power
        matrix = decay * torch.randn(rows, columns, device="cuda")
        reference = package.newton_schulz(matrix.double(), "classic")
        errors = {
            (method, backend): relative_error(package.newton_schulz(matrix, method, backend=backend), reference)
            for method, backend in itertools.product(("classic", "gram"), ("torch", "triton"))
        }
        assert errors["gram", "triton"] <= errors["classic", "torch"], errors
        assert errors["classic", "triton"] <= 1.3 * errors["classic", "torch"], errors


def test_out_shares_the_memory_of_the_matrices():
    matrices = torch.randn(2, 300, 200, device="cuda", dtype=torch.bfloat16)
    expected = package.newton_schulz(matrices.float())
    shared = matrices.view(torch.float16)
    package.newton_schulz(matrices, out=shared)
    assert relative_error(shared, expected.double()) < 1e-3


def test_quack_agrees():
    pytest.importorskip("quack")
    matrices = torch.randn(2, 512, 1024, device="cuda")
    ours = package.newton_schulz(matrices)
    assert relative_error(package.newton_schulz(matrices, backend="quack"), ours.double()) < 2e-3
