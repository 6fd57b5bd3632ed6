"""The loaded kernel against the polynomial of the singular values, and what a batch may rely on."""

import pytest
import torch

pytestmark = pytest.mark.kernels_ci

SHAPES = [(1, 1), (5, 40), (40, 5), (96, 96), (130, 260), (333, 777)]


def definition(matrices, steps):
    """U p(S) V' in float64."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def plain_loop(matrices, steps):
    """The same steps one operation at a time in bfloat16, each of them rounded."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = (wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide is matrices else x.mT


def relative_error(got, wanted):
    return (got.double() - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("coefficients", ["motif", "jordan", "polar_express"])
@pytest.mark.parametrize("method", ["gram", "classic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(kernel, device, shape, method, coefficients):
    matrices = torch.randn(2, *shape, device=device)
    got = kernel.newton_schulz(matrices, method, coefficients)
    steps = kernel.COEFFICIENTS[coefficients]
    wanted = definition(matrices, steps)
    # Of few singular values the steps amplify bfloat16's rounding: there no more than they do in the plain loop.
    bound = 1e-4 if device == "cpu" else max(0.03, relative_error(plain_loop(matrices, steps), wanted))
    assert relative_error(got, wanted) < bound


@pytest.mark.parametrize("method", ["gram", "classic"])
def test_a_matrix_does_not_depend_on_its_batch(kernel, device, method):
    matrices = torch.randn(4, 130, 260, device=device, dtype=torch.bfloat16)
    together = kernel.newton_schulz(matrices, method)
    assert torch.equal(together, kernel.newton_schulz(matrices, method))
    assert torch.equal(together[2], kernel.newton_schulz(matrices[2], method))


@pytest.mark.parametrize("method", ["gram", "classic"])
def test_parts_of_either_orientation_are_as_alone(kernel, device, method):
    parts = [torch.randn(2, 260, 130, device=device).bfloat16(), torch.randn(1, 130, 260, device=device).bfloat16()]
    together = kernel.newton_schulz(parts, method)
    assert all(torch.equal(got, kernel.newton_schulz(part, method)) for got, part in zip(together, parts, strict=True))


def test_zeros(kernel, device):
    assert kernel.newton_schulz(torch.zeros(2, 64, 96, device=device)).count_nonzero() == 0


def test_compiles_without_a_break(kernel, device):
    matrices = torch.randn(2, 64, 96, device=device)
    compiled = torch.compile(kernel.newton_schulz, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(matrices), kernel.newton_schulz(matrices))
