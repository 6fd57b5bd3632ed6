"""One token's products and PolyNorm against float64."""

import pytest
import torch

from .conftest import INTERPRETED

pytestmark = pytest.mark.kernels_ci
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3} | ({} if INTERPRETED else {torch.bfloat16: 6e-3})
SIZES = [((16,), 64), ((24,), 96), ((40, 16, 16), 128), ((8, 8), 1024), ((7,), 2048), ((2,), 5120)]


def relative_error(actual, wanted):
    assert torch.isfinite(actual).all()
    return float((actual.double() - wanted).norm() / wanted.norm())


def make(sizes, features, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(1, 1, features, device=device, dtype=dtype)
    weights = [torch.randn(size, features, device=device, dtype=dtype) / features**0.5 for size in sizes]
    norm_weight = 1 + 0.1 * torch.randn(features, device=device)
    residual = torch.randn(1, 1, sum(sizes), device=device, dtype=dtype)
    return x, weights, norm_weight, residual


def define(x, weights, norm_weight, residual, eps):
    x = x.double()
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.double()
    out = torch.cat([x @ weight.double().T for weight in weights], dim=-1)
    return out if residual is None else out + residual.double()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize(("sizes", "features"), SIZES, ids=str)
def test_products(kernel, device, poisoned, sizes, features, add, norm, dtype):
    x, weights, norm_weight, residual = make(sizes, features, dtype, device)
    norm_weight, residual = norm_weight if norm else None, residual if add else None
    out = kernel.product(x, weights, norm_weight=norm_weight, eps=1e-5, residual=residual)
    assert out.shape == (1, 1, sum(sizes))
    assert out.dtype == dtype
    assert not out.requires_grad
    assert relative_error(out, define(x, weights, norm_weight, residual, 1e-5)) <= LIMITS[dtype]


def test_autocast_changes_nothing(kernel, device):
    x, weights, norm_weight, residual = make((16,), 64, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = kernel.product(x, weights, norm_weight=norm_weight, residual=residual)
    assert relative_error(out, define(x, weights, norm_weight, residual, 1e-6)) <= LIMITS[torch.float32]


def test_the_norm_is_of_the_whole_row_and_eps_counts(kernel, device):
    x, weights, norm_weight, _ = make((16,), 128, torch.float32, device)
    out = kernel.product(1e-3 * x, weights, norm_weight=norm_weight, eps=1e-4)
    assert relative_error(out, define(1e-3 * x, weights, norm_weight, None, 1e-4)) <= 2e-6


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("features", [16, 100, 1024, 1500])
def test_poly_norm(kernel, device, poisoned, features, dtype):
    torch.manual_seed(0)
    both = torch.randn(1, 1, 2 * features, device=device, dtype=dtype)
    weight, bias = torch.tensor([0.5, -0.3, 0.7], device=device), torch.tensor([0.1], device=device)
    out = kernel.poly_norm_mul(both, weight, bias, 1e-6)
    gate, up = both.double().chunk(2, dim=-1)
    wanted = bias.double()
    for factor, power in zip(weight.double(), (gate**3, gate**2, gate), strict=True):
        wanted = wanted + factor * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + 1e-6)
    assert out.shape == (1, 1, features)
    assert relative_error(out, wanted * up) <= LIMITS[dtype]


def test_tiles_divide_the_weights(kernel):
    launch = kernel.ops.launch
    if launch is None:
        pytest.skip("needs Triton")
    assert launch.tile(4096, (5120, 2048, 2048)) == (8, 512, 4)
    assert launch.tile(16384, (4096,)) == (2, 1024, 4)
    assert launch.tile(96, (12,)) == (4, 32, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="large")
@pytest.mark.parametrize(("sizes", "features"), [((4096, 1024, 1024), 4096), ((2048,), 16384)], ids=str)
def test_large_weights(kernel, device, poisoned, sizes, features):
    x, weights, norm_weight, residual = make(sizes, features, torch.bfloat16, device)
    out = kernel.product(x, weights, norm_weight=norm_weight, residual=residual)
    assert relative_error(out, define(x, weights, norm_weight, residual, 1e-6)) <= LIMITS[torch.bfloat16]


def test_one_graph(kernel, device):
    x, weights, norm_weight, residual = make((16, 16), 64, torch.float32, device)

    def both(x):
        out = kernel.product(x, weights, norm_weight=norm_weight, residual=residual[..., :32].contiguous())
        return kernel.poly_norm_mul(out, norm_weight[:3], norm_weight[:1])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))
    torch.library.opcheck(kernel.ops._product, (x, weights, norm_weight, 1e-6, residual))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 2, 64)}, "one token"),
        ({"weights": [torch.randn(8, 32)]}, "must be"),
        ({"weights": [torch.randn(64, 8).T]}, "contiguous"),
        ({"weights": [torch.randn(8, 64)] * 4}, "from one to three"),
        ({"norm_weight": torch.ones(32)}, "norm_weight"),
        ({"residual": torch.ones(1, 1, 9)}, "residual"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(kernel, change, message):
    arguments = {"x": torch.randn(1, 1, 64), "weights": [torch.randn(8, 64)]} | change
    with pytest.raises(ValueError, match=message):
        kernel.product(**arguments)
