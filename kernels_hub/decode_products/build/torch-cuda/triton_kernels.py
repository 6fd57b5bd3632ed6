"""Triton kernels of one token: a product with up to three weights, and PolyNorm.

Each loads what does not depend on the kernel before it, waits for that kernel, and then lets the next one start
(programmatic dependent launch), so that the weights' stream does not stop between kernels.

Shapes: K features in, R rows of the weights a program, C columns a step, F features of PolyNorm.
"""

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass

else:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _step(x_ptr, norm_ptr, tile, sums, squares, columns, NORM: tl.constexpr):
    """Adds one tile's products to sums (R, C); squares (C,) gathers those of x for the norm."""
    x = tl.load(x_ptr + columns).to(tl.float32)
    if NORM:
        squares += x * x
        x *= tl.load(norm_ptr + columns).to(tl.float32)
    sums += tile.to(tl.float32) * x[None, :]
    return sums, squares


@triton.jit
def product_kernel(
    x_ptr, norm_ptr, first_ptr, second_ptr, third_ptr, residual_ptr, out_ptr, first_end, second_end, eps,
    K: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out (N,) = weights (N, K) of norm(x) (K,) + residual (N,), the weights one after another; grid (N / R,).

    The norm's factor is the same for all of K, so it is taken last, from sums that go along.
    """
    row = tl.program_id(0) * ROWS
    weight_ptr = first_ptr + row.to(tl.int64) * K
    if row >= second_end:
        weight_ptr = third_ptr + (row - second_end).to(tl.int64) * K
    elif row >= first_end:
        weight_ptr = second_ptr + (row - first_end).to(tl.int64) * K
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    addresses = weight_ptr + rows[:, None] * K + columns[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    tile = tl.load(addresses, eviction_policy="evict_first")  # (R, C)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for begin in range(0, K - COLUMNS, COLUMNS):
        ahead = tl.load(addresses + (begin + COLUMNS), eviction_policy="evict_first")
        sums, squares = _step(x_ptr, norm_ptr, tile, sums, squares, begin + columns, NORM)
        tile = ahead
    sums, squares = _step(x_ptr, norm_ptr, tile, sums, squares, (K - COLUMNS) + columns, NORM)
    out = tl.sum(sums, 1)  # (R,)
    if NORM:
        out *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if ADD:
        out += tl.load(residual_ptr + row + rows).to(tl.float32)
    tl.store(out_ptr + row + rows, out.to(out_ptr.dtype.element_ty))


@triton.jit
def poly_norm_mul_kernel(
    gate_ptr, weight_ptr, bias_ptr, out_ptr, num_features, eps, BLOCK: tl.constexpr, PART: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out (F,) = PolyNorm(gate) * up from gate and up, one after the other (2F,); grid (F / part,).

    Every program takes the means over all of the gate, which is faster than to pass them on.
    """
    cubic, square, linear, bias = (
        tl.load(weight_ptr).to(tl.float32), tl.load(weight_ptr + 1).to(tl.float32),
        tl.load(weight_ptr + 2).to(tl.float32), tl.load(bias_ptr).to(tl.float32),
    )  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = columns < num_features
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_features + columns, mask=inside, other=0.0).to(tl.float32)
    everything = tl.arange(0, BLOCK)
    x = tl.load(gate_ptr + everything, mask=everything < num_features, other=0.0).to(tl.float32)
    second = x * x
    linear *= tl.rsqrt(tl.sum(second, 0) / num_features + eps)
    square *= tl.rsqrt(tl.sum(second * second, 0) / num_features + eps)
    cubic *= tl.rsqrt(tl.sum(second * second * second, 0) / num_features + eps)
    out = (((cubic * gate + square) * gate + linear) * gate + bias) * up
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
