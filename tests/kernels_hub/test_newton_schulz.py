"""The Newton-Schulz package on the CPU: both forms against singular values, errors in half types, the contract."""

import pytest
import torch

from tests.kernels_hub.newton_schulz_cases import draw, load_package, polynomial_of_singular_values, relative_error

package = load_package()
newton_schulz, COEFFICIENTS = package.newton_schulz, package.COEFFICIENTS

SHAPES = [(1, 1), (1, 7), (5, 5), (12, 31), (31, 12), (33, 64)]


@pytest.mark.parametrize("method", ["classic", "gram"])
@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_polynomial_of_the_singular_values(shape, coefficients, method):
    matrices = torch.randn(2, *shape, dtype=torch.float64)
    expected = polynomial_of_singular_values(matrices, COEFFICIENTS[coefficients])
    assert relative_error(newton_schulz(matrices, method, coefficients), expected) < 1e-9


@pytest.mark.parametrize("restarts", [(), (1,), (2,), (1, 3), (1, 2, 3, 4)])
def test_restarts_change_nothing_but_rounding(restarts):
    matrix = torch.randn(24, 40, dtype=torch.float64)
    expected = polynomial_of_singular_values(matrix, COEFFICIENTS["motif"])
    assert relative_error(newton_schulz(matrix, restarts=restarts), expected) < 1e-9


def test_explicit_coefficients():
    steps = ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5), (1.875, -1.25, 0.375))
    matrix = torch.randn(9, 14, dtype=torch.float64)
    for method in ("classic", "gram"):
        got = newton_schulz(matrix, method, steps)
        assert relative_error(got, polynomial_of_singular_values(matrix, steps)) < 1e-12


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("motif", 0.6, 1.2), ("jordan", 0.6, 1.3), ("polar_express", 0.8, 1.2)]
)
def test_singular_values_come_out_near_one(coefficients, low, high):
    matrix = draw(48, 96, "gaussian")
    values = torch.linalg.svdvals(newton_schulz(matrix, coefficients=coefficients))
    assert low < values.min()
    assert values.max() < high


# Measured at 256x1024 with float32 sums, plus 15%.
ERRORS = {
    # spectrum: classic bfloat16, Gram float16 (2,), Gram bfloat16 (2,), Gram bfloat16 (1, 3)
    "gaussian": (0.0064, 0.0012, 0.0081, 0.0078),
    "power_law": (0.027, 0.0063, 0.049, 0.028),
    "exponential": (0.075, 0.019, 0.141, 0.074),
    "low_rank_noise": (0.273, 0.027, 0.21, 0.28),
}


@pytest.mark.parametrize("spectrum", sorted(ERRORS))
def test_errors_in_half_types(spectrum):
    matrix = draw(256, 1024, spectrum)
    reference = newton_schulz(matrix, "classic")
    half = [
        newton_schulz(matrix.float(), "classic", compute_dtype=torch.bfloat16),
        newton_schulz(matrix.float(), "gram", compute_dtype=torch.float16),
        newton_schulz(matrix.float(), "gram", restarts=(2,), compute_dtype=torch.bfloat16),
        newton_schulz(matrix.float(), "gram", restarts=(1, 3), compute_dtype=torch.bfloat16),
    ]
    errors = [relative_error(value, reference) for value in half]
    for error, bound in zip(errors, ERRORS[spectrum], strict=True):
        assert error < bound, errors
    assert errors[1] < 0.35 * errors[0], "the Gram form in float16 must beat the classic form in bfloat16"


@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
@pytest.mark.parametrize("columns", [128, 140, 160, 192])
def test_nearly_square_matrices_are_no_worse_than_the_classic_form(columns, coefficients):
    matrix = draw(128, columns, "gaussian")
    reference = newton_schulz(matrix, "classic", coefficients)
    classic = newton_schulz(matrix.float(), "classic", coefficients, compute_dtype=torch.bfloat16)
    gram = newton_schulz(matrix.float(), "gram", coefficients, compute_dtype=torch.float16)
    assert relative_error(gram, reference) < relative_error(classic, reference)


@pytest.mark.parametrize("columns", [130, 512])
@pytest.mark.parametrize("num_steps", [6, 7, 10])
def test_more_steps_are_no_worse_than_in_the_classic_form(num_steps, columns):
    steps = COEFFICIENTS["jordan"][:1] * num_steps
    for spectrum in ERRORS:
        matrix = draw(128, columns, spectrum)
        reference = newton_schulz(matrix, "classic", steps)
        classic = newton_schulz(matrix.float(), "classic", steps, compute_dtype=torch.bfloat16)
        gram = newton_schulz(matrix.float(), "gram", steps, compute_dtype=torch.float16)
        assert relative_error(gram, reference) < 0.5 * relative_error(classic, reference), spectrum


def test_default_restarts():
    assert package.default_restarts(4096, 4096) == (2, 3)
    assert package.default_restarts(5120, 4096) == (2,)
    assert package.default_restarts(4096, 5119) == (2, 3)
    assert package.default_restarts(8, 8, num_steps=3) == (2,)
    assert package.default_restarts(8, 8, num_steps=2) == ()
    assert package.default_restarts(8, 16, num_steps=7) == (2, 4, 6)
    assert package.default_restarts(8, 8, num_steps=6) == (2, 3, 4)
    flops = package.newton_schulz_flops
    assert flops(64, 64) == flops(64, 64, restarts=(2,)), "the second restart is free for a square"
    matrix = torch.randn(6, 9)
    assert torch.equal(newton_schulz(matrix), newton_schulz(matrix, restarts=(2,)))
    assert torch.equal(newton_schulz(matrix[:, :6]), newton_schulz(matrix[:, :6], restarts=(2, 3)))


def test_without_a_restart_the_gram_form_diverges():
    worst = 0.0
    for spectrum in ERRORS:
        matrix = draw(256, 1024, spectrum)
        got = newton_schulz(matrix.float(), restarts=(), compute_dtype=torch.bfloat16)
        error = relative_error(got, newton_schulz(matrix, "classic"))
        worst = max(worst, float("inf") if error != error else error)
    assert worst > 1


@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
@pytest.mark.parametrize("method", ["classic", "gram"])
def test_batch_orientation_and_repeats_are_exact(method, compute_dtype):
    matrices = torch.randn(2, 3, 20, 33)

    def run(x):
        return newton_schulz(x, method, compute_dtype=compute_dtype)

    got = run(matrices)
    assert got.shape == matrices.shape
    assert got.dtype == matrices.dtype
    assert torch.equal(got, run(matrices))
    assert torch.equal(got[1, 2], run(matrices[1, 2]))
    assert torch.equal(got[:, 1:].flip(1), run(matrices[:, 1:].flip(1)))
    assert torch.equal(got.mT, run(matrices.mT))
    assert torch.equal(got.mT, run(matrices.mT.contiguous()))


@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
@pytest.mark.parametrize("method", ["classic", "gram"])
def test_parts_of_either_orientation_are_as_alone(method, compute_dtype):
    gate_and_up, down, nothing = torch.randn(2, 33, 20), torch.randn(20, 33), torch.empty(0, 20, 33)
    parts = [gate_and_up, down, nothing]
    got = newton_schulz(parts, method, compute_dtype=compute_dtype)
    for part, found in zip(parts, got, strict=True):
        assert torch.equal(found, newton_schulz(part, method, compute_dtype=compute_dtype))
    outs = [torch.full_like(part, float("nan")) for part in parts]
    written = newton_schulz(tuple(parts), method, compute_dtype=compute_dtype, out=outs)
    assert all(one is out and torch.equal(out, found) for one, out, found in zip(written, outs, got, strict=True))
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(parts, method, compute_dtype=compute_dtype), got))


@pytest.mark.parametrize(
    ("parts", "out", "message"),
    [
        ([], None, "empty sequence"),
        ([torch.ones(4, 6), torch.ones(4, 7)], None, r"\(4, 6\).*\(4, 7\).*up to transposition"),
        ([torch.ones(4, 6), torch.ones(6, 4).double()], None, "one type"),
        ([torch.ones(4, 6), torch.ones(6)], None, "rows, columns"),
        ([torch.ones(4, 6), torch.ones(6, 4)], [torch.ones(4, 6)], "one for each of 2"),
        ([torch.ones(4, 6), torch.ones(6, 4)], [torch.ones(4, 6), torch.ones(4, 6)], r"out has shape \(4, 6\)"),
        ([torch.ones(4, 6), torch.ones(6, 4)], [torch.ones(4, 6), torch.ones(6, 4).half()], "of one type"),
    ],
)
def test_bad_parts(parts, out, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(parts, out=out)


@pytest.mark.parametrize("method", ["classic", "gram"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_give_zeros_and_a_scale_gives_the_same(dtype, method):
    assert newton_schulz(torch.zeros(2, 5, 8, dtype=dtype), method).count_nonzero() == 0
    matrix = torch.randn(16, 24).to(dtype)
    assert relative_error(newton_schulz(64 * matrix, method), newton_schulz(matrix, method).double()) < 1e-3


def test_a_non_finite_matrix_does_not_touch_its_neighbours():
    matrices = torch.randn(3, 8, 12)
    expected = newton_schulz(matrices)
    matrices[1, 0, 0] = float("nan")
    got = newton_schulz(matrices)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], expected[::2])


def test_out_and_shared_memory():
    matrices = torch.randn(3, 9, 4).bfloat16()
    expected = newton_schulz(matrices)
    out = torch.full((3, 9, 4), float("nan"))
    assert newton_schulz(matrices, out=out) is out
    assert torch.equal(out.bfloat16(), expected)
    shared = matrices.view(torch.float16)
    newton_schulz(matrices, out=shared)
    assert torch.equal(shared, out.half())


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty(shape):
    assert newton_schulz(torch.empty(shape)).shape == shape


def test_no_gradient_is_recorded():
    assert not newton_schulz(torch.randn(4, 6, requires_grad=True)).requires_grad


@pytest.mark.parametrize("method", ["classic", "gram"])
def test_compiles_without_a_break(method):
    matrices = torch.randn(2, 6, 10)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(matrices, method), newton_schulz(matrices, method))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "method='newton'.*gram, classic"),
        ({"coefficients": "best"}, "coefficients='best'.*jordan"),
        ({"coefficients": ()}, "at least one step"),
        ({"coefficients": ((1.0, 2.0),)}, r"coefficients\[0\].*three finite"),
        ({"coefficients": ((1.0, float("nan"), 2.0),)}, "three finite"),
        ({"restarts": (0,)}, "1 .. 4"),
        ({"restarts": (5,)}, "1 .. 4"),
        ({"backend": "cuda"}, "backend='cuda'.*triton"),
        ({"backend": "triton"}, "cannot run on cpu.*backend='torch'"),
        ({"backend": "quack"}, "backend='torch'"),
        ({"compute_dtype": torch.int32}, "floating"),
        ({"out": torch.empty(4, 5)}, "out has shape"),
        ({"out": torch.empty(6, 4).T}, "contiguous"),
    ],
)
def test_bad_settings_name_the_mend(arguments, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(torch.randn(4, 6), **arguments)


@pytest.mark.parametrize("matrices", [torch.randn(4), torch.ones(3, 4, dtype=torch.int64)])
def test_bad_matrices(matrices):
    with pytest.raises(ValueError, match="floating"):
        newton_schulz(matrices)


def test_kernels_refuse_float64():
    with pytest.raises(ValueError, match="backend='torch' for float64"):
        newton_schulz(torch.randn(4, 6, dtype=torch.float64), backend="triton")


# TFLOP a matrix: classic, classic symmetric, Gram symmetric.
OPERATIONS = {
    (4096, 16384): (6.185, 4.467, 2.611),
    (5120, 4096): (2.405, 1.632, 1.477),
    (2048, 4096): (0.429, 0.301, 0.223),
    (4096, 8192): (3.436, 2.405, 1.787),
}


@pytest.mark.parametrize("shape", sorted(OPERATIONS))
def test_operations(shape):
    flops = package.newton_schulz_flops
    counted = (flops(*shape, "classic", symmetric=False), flops(*shape, "classic"), flops(*shape, "gram"))
    assert [round(value / 1e12, 3) for value in counted] == list(OPERATIONS[shape])
    assert flops(*shape) == flops(*reversed(shape))


def test_operations_of_the_gram_form_are_those_executed():
    """Count the products a pass really makes, for several restarts."""
    size, length = 6, 10
    executed = 0

    class Counting(package.orthogonalize.TorchProducts):
        def symmetric(self, left, right, *rest, **factors):
            nonlocal executed
            executed += size * left.size(1) * size
            return super().symmetric(left, right, *rest, **factors)

        def apply(self, left, last=False):
            nonlocal executed
            executed += 2 * size * size * length
            super().apply(left, last)

    for restarts in ((), (2,), (1, 3)):
        executed = 0
        x = torch.randn(size, length)
        steps = COEFFICIENTS["motif"]
        package.orthogonalize.gram_iteration(Counting(x, torch.empty_like(x), x.dtype, 1e-7), steps, restarts)
        assert executed == package.newton_schulz_flops(size, length, restarts=restarts)


def test_operations_of_an_unknown_method():
    with pytest.raises(ValueError, match="gram"):
        package.newton_schulz_flops(4, 5, "newton")
