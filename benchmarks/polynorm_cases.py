"""What `benchmarks/polynorm.py` compares, on which inputs, and the check that must pass before anything is timed.

Shapes: T rows (tokens), N = 16384 columns.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch._functorch.config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kernels_hub  # noqa: E402

COLUMNS = 16384
KERNEL = kernels_hub.load_local("polynorm")
torch._functorch.config.donated_buffer = False  # the backward of one graph is timed again and again
torch._dynamo.config.recompile_limit = 64  # one function is compiled for every shape


def eager(x, up, weight, bias, eps=1e-6):
    """The model's own PolyNorm, as `modeling_motif2` computes it."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    square = wide * wide
    total = bias.to(wide.dtype)
    for factor, power in zip(weight.to(wide.dtype).unbind(), (square * wide, square, wide), strict=True):
        total = total + factor * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + eps)
    return (total if up is None else total * up).to(x.dtype)


def ours(x, up, weight, bias):
    """The kernels of this checkout."""
    return KERNEL.poly_norm(x, weight, bias) if up is None else KERNEL.poly_norm_mul(x, up, weight, bias)


def peers() -> dict[str, Callable]:
    """Implementations to compare by name; those that cannot be had are named with the reason."""
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    found = {"eager": eager, "torch.compile": compiled, "ours": ours}
    try:
        from liger_kernel.ops.poly_norm import LigerPolyNormFunction

        def liger(x, up, weight, bias):
            y = LigerPolyNormFunction.apply(x, weight, bias.reshape(()), 1e-6)
            return y if up is None else y * up

        found["liger"] = liger
    except ImportError as error:
        print(f"liger: not timed, {error}")
    try:
        layers = kernels_hub.load_layers("official", {"PolyNorm", "FusedMulPolyNorm"})

        def official(x, up, weight, bias):
            owner = argparse.Namespace(weight=weight, bias=bias, eps=1e-6)
            if up is None:
                return layers.classes["PolyNorm"].forward(owner, x)
            return layers.classes["FusedMulPolyNorm"].forward(owner, x, up)

        found["official"] = official
    except kernels_hub.KernelUnavailable as error:
        print(f"official kernel: not timed, {error}")
    return found


def make_inputs(shape, dtype, mul, parameter_dtype=torch.float32):
    """Random x, up (or None), weight, bias and dy on the GPU; all but dy want gradients."""
    x = torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()
    up = torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() if mul else None
    weight = torch.tensor([0.4, 0.3, 0.3], device="cuda", dtype=parameter_dtype).requires_grad_()
    bias = torch.tensor([0.05], device="cuda", dtype=parameter_dtype).requires_grad_()
    return x, up, weight, bias, torch.randn(shape, device="cuda", dtype=dtype)


def values_and_gradients(function, x, up, weight, bias, dy):
    """y and the gradients of x, (up,) weight, bias."""
    leaves = [leaf for leaf in (x, up, weight, bias) if leaf is not None]
    y = function(x, up, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check() -> None:
    """Compares values and all gradients with float64, on poisoned memory, twice, and compiled.

    Raises:
        AssertionError: some result is wrong; nothing may be timed then.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    shapes = [
        (3, 5),
        (2, 7, 48),
        (33, 1000),
        (5, 16384),
        (3, 16385),
        (4, 20001),
        (2, 32768),
        (2, 65536),
        (2049, 2048),
        (4097, 16384),
    ]
    limits = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
    worst = 0.0
    for shape, dtype, mul in product(shapes, limits, (False, True)):
        inputs = make_inputs(shape, dtype, mul)
        results = values_and_gradients(ours, *inputs)
        again = values_and_gradients(ours, *inputs)
        wide = [i if i is None else i.detach().double().requires_grad_(i.requires_grad) for i in inputs]
        for index, (got, same, want) in enumerate(
            zip(results, again, values_and_gradients(eager, *wide), strict=True)
        ):
            assert torch.equal(got, same), f"{shape} {dtype} mul={mul} output {index}: two runs differ"
            error = ((got.double() - want).norm() / want.norm()).item()
            limit = max(limits[dtype], 1e-4) if index >= len(results) - 2 else limits[dtype]
            worst = max(worst, error / limit)
            assert error <= limit, (
                f"{shape} {dtype} mul={mul} output {index}: relative error {error:.1e} > {limit:.0e}"
            )
    _check_strides_and_compile()
    torch.use_deterministic_algorithms(False)
    print(f"correct: {len(shapes) * 6} cases, worst error {worst:.2f} of its limit")


def _check_strides_and_compile() -> None:
    pair = torch.randn(4, 6, 2 * 4096, device="cuda", dtype=torch.bfloat16)
    _, _, weight, bias, _ = make_inputs((1, 1), torch.bfloat16, False)
    x, up = pair.chunk(2, dim=-1)
    packed = ours(x, up, weight, bias)
    assert torch.equal(packed, ours(x.contiguous(), up.contiguous(), weight, bias)), "strided rows differ"
    turned = ours(x.transpose(0, 1), up.transpose(0, 1), weight, bias)
    assert torch.equal(turned, packed.transpose(0, 1)), "transposed rows differ"
    assert ours(x[:0], up[:0], weight, bias).shape == (0, 6, 4096), "empty input"
    inputs = make_inputs((4, 4096), torch.bfloat16, True)
    compiled = torch.compile(lambda x, up, weight, bias: ours(x * 2, up, weight, bias) + 1, fullgraph=True)
    plain = values_and_gradients(lambda x, up, weight, bias: ours(x * 2, up, weight, bias) + 1, *inputs)
    for got, want in zip(values_and_gradients(compiled, *inputs), plain, strict=True):
        assert torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2), "compiled differs"
