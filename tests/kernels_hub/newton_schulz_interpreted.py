"""Tests of the Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest <this file>`.

They need that variable before triton is imported anywhere, so `test_interpreter.py` runs them in another process.
The interpreter multiplies bfloat16 wrongly (it takes the bits for integers): float16 stands for both.
"""

import importlib

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

from tests.kernels_hub.newton_schulz_cases import load_package, relative_error

package = load_package()
kernels = importlib.import_module("newton_schulz.triton_products")
TileConfig, aligned_empty = kernels.TileConfig, kernels.aligned_empty
_tile_position = importlib.import_module("newton_schulz.triton_kernels")._tile_position
kernels._NORM_PARTS = 4  # a program takes milliseconds here

# Triton 3.6 reads a loop's limits with int() of one-element arrays, which NumPy 2.4 refuses.
_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_and_index

WIDE, SQUARE = TileConfig(16, 32, 16), TileConfig(16, 16, 16)
ONE_SHOT = TileConfig(16, 32, 16, persistent=False)


def test_the_interpreter_runs():
    assert triton.knobs.runtime.interpret


def half(*shape):
    return aligned_empty(*shape, torch.float16, torch.device("cpu")).copy_(torch.randn(shape))


def poisoned(*shape):
    return aligned_empty(*shape, torch.float16, torch.device("cpu")).fill_(float("nan"))


@pytest.mark.parametrize("config", [WIDE, SQUARE, ONE_SHOT], ids=["wide", "square", "one_shot"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 16),
        (1, 5, 40),
        (2, 33, 9),
        pytest.param((3, 33, 9), marks=pytest.mark.slow),
        pytest.param((2, 48, 50), marks=pytest.mark.slow),
        pytest.param((1, 80, 17), marks=pytest.mark.slow),
    ],
)
def test_symmetric_products(shape, config):
    batch, size, _ = shape
    x = half(*shape)
    gram = kernels.symmetric_product(x, out=poisoned(batch, size, size), config=config)
    assert relative_error(gram, x.double() @ x.double().mT) < 4e-4
    assert torch.equal(gram, gram.mT)
    addend = kernels.symmetric_product(x, config=config)
    got = kernels.symmetric_product(gram, gram, addend, 0.5, -2.0, 3.0, poisoned(batch, size, size), config)
    exact = gram.double()
    expected = 0.5 * exact @ exact - 2.0 * addend.double() + 3.0 * torch.eye(size, dtype=torch.float64)
    assert relative_error(got, expected) < 4e-4
    assert torch.equal(got, got.mT)


def test_a_diagonal_block_is_made_symmetric():
    """A right operand that is not quite symmetric must not make the result so."""
    left = half(1, 40, 40)
    assert not torch.equal(left, left.mT)
    got = kernels.symmetric_product(left, half(1, 40, 40), config=WIDE)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("config", [WIDE, ONE_SHOT], ids=["persistent", "one_shot"])
@pytest.mark.parametrize("shape", [(3, 40, 8), pytest.param((5, 48, 24), marks=pytest.mark.slow)])
def test_the_batch_does_not_change_a_matrix(shape, config):
    x = half(*shape)
    together = kernels.symmetric_product(x, config=config)
    for index, matrix in enumerate(x):
        assert torch.equal(kernels.symmetric_product(matrix[None], config=config)[0], together[index])


@pytest.mark.parametrize("transpose", [False, True])
def test_normalise(transpose):
    source = torch.randn(2, 37, 70)[:, :, :65]
    out = poisoned(2, *((65, 37) if transpose else (37, 65)))
    kernels.normalise(source, out, 1e-7, transpose)
    expected = source.double() / source.double().norm(dim=(1, 2), keepdim=True)
    assert relative_error(out.mT if transpose else out, expected) < 4e-4


@pytest.mark.parametrize("method", ["gram", pytest.param("classic", marks=pytest.mark.slow)])
def test_whole_pass(method):
    matrices = torch.randn(2, 20, 33)
    run = {"method": method, "compute_dtype": torch.float16}
    got = package.newton_schulz(matrices, backend="triton", **run)
    reference = package.newton_schulz(matrices.double(), "classic")
    twin = package.newton_schulz(matrices, backend="torch", **run)
    assert relative_error(got, reference) < 1.5 * relative_error(twin, reference)
    assert torch.equal(got[1], package.newton_schulz(matrices[1], backend="triton", **run))
    assert relative_error(package.newton_schulz(matrices.mT, backend="triton", **run).mT, got.double()) < 1e-6


@pytest.mark.parametrize("method", ["gram", "classic"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_gate_up_and_down_are_one_batch(method, dtype, monkeypatch):
    parts = [torch.randn(2, 17, 9, dtype=dtype), torch.randn(1, 9, 17, dtype=dtype)]
    run = {"method": method, "backend": "triton", "compute_dtype": torch.float16}
    run["coefficients"] = package.COEFFICIENTS["motif"][:3]
    alone = [package.newton_schulz(part, **run) for part in parts]
    batches, product = [], kernels.symmetric_product
    monkeypatch.setattr(kernels, "symmetric_product", lambda *a, **k: batches.append(len(a[0])) or product(*a, **k))
    together = package.newton_schulz(parts, **run)
    assert set(batches) == {3}, "each product is one launch for all"
    assert all(map(torch.equal, together, alone))


def test_whole_pass_into_half_results_and_zeros():
    matrices = torch.randn(2, 33, 20).half()
    matrices[1] = 0
    out = torch.full_like(matrices, float("nan"))
    package.newton_schulz(matrices, backend="triton", restarts=(1, 3), out=out)
    reference = package.newton_schulz(matrices.double(), "classic")
    assert relative_error(out, reference) < 3e-3
    assert out[1].count_nonzero() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 8, 8),), "float16 or bfloat16"),
        ((torch.zeros(8, 8).half(),), "batch, rows, columns"),
        ((torch.zeros(1, 8, 9).half(),), "aligned_empty"),
        ((torch.zeros(1, 8, 8).half(), torch.zeros(1, 8, 16).half()), "must equal left's"),
        ((torch.zeros(1, 8, 8).half(), torch.zeros(1, 8, 8).bfloat16()), "left is torch.float16"),
        ((torch.zeros(1, 8, 8).half(), None, torch.zeros(1, 16, 16).half()), "addend has shape"),
        ((torch.zeros(65).half()[1:].view(1, 8, 8),), "multiple of 16 bytes"),
    ],
)
def test_operands_the_kernel_cannot_take(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.symmetric_product(*arguments)


@pytest.mark.parametrize(("block", "wide"), [(16, 64), (32, 16)])
def test_tiles_the_kernel_cannot_take(block, wide):
    with pytest.raises(ValueError, match="block or 2"):
        TileConfig(block, wide)


@triton.jit
def _store_tile_positions(rows, columns, COUNT: tl.constexpr, RATIO: tl.constexpr):
    tile = tl.arange(0, COUNT)
    row, column = _tile_position(tile, RATIO)
    tl.store(rows + tile, row)
    tl.store(columns + tile, column)


@pytest.mark.parametrize("ratio", [1, 2])
def test_tiles_cover_the_triangle_in_order(ratio):
    count = 2**18
    rows, columns = torch.empty(2, count, dtype=torch.int32)
    _store_tile_positions[(1,)](rows, columns, COUNT=count, RATIO=ratio)
    expected = [(row, column) for column in range(600) for row in range(ratio * column + 1)]
    length = min(count, len(expected))
    assert length > 180_000
    assert list(zip(rows.tolist(), columns.tolist(), strict=True))[:length] == expected[:length]
