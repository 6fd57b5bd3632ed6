"""Triton kernels of PolyNorm.

`y = w0 x^3 r3 + w1 x^2 r2 + w2 x r1 + b`, times `up` where one is given, with `rk = 1 / sqrt(mean(x^(2k)) + eps)` over
a row. A row that fits the registers is read once: statistics and result come from the same registers. A longer one is
read twice, the second time mostly from the L2 cache. The kernels that read twice can also stop after the sums or start
from them, which is what tensor parallelism needs: a row's sums are added over the ranks in between.

Shapes: R rows (all leading dimensions as one), N columns (the dimension of the means), P programs.
Arithmetic is float32, rounded once at the store. Every sum has a fixed order: results repeat bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _load_packed(pointer, row, stride, columns, num_columns):
    return tl.load(pointer + row * stride + columns, mask=columns < num_columns, other=0.0)


@triton.jit
def _load_row(pointer, row, stride, columns, num_columns):
    return _load_packed(pointer, row, stride, columns, num_columns).to(tl.float32)


@triton.jit
def _again(packed, total, num_columns, PACKED: tl.constexpr):
    """`packed` once more, in float32, after its row's finished sum `total`.

    Where `PACKED`, the compiler cannot tell that these are the numbers from before the sum: meanwhile it keeps 16 bits
    an element in registers, not the float32 of the first use.
    """
    if PACKED:
        zero = (total.to(tl.int32, bitcast=True) & (num_columns >> 31)).to(tl.int16)
        packed = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;", "=r,r,r", [packed, zero], dtype=packed.dtype, is_pure=True, pack=2
        )
    return packed.to(tl.float32)


@triton.jit
def _store_inverse_rms(inverse_rms_ptr, row, sum2, sum4, sum6, count, eps):
    """Inverse root mean squares r1, r2, r3 of x, x^2, x^3 from a row's sums, kept for the backward."""
    r1 = tl.rsqrt(sum2 / count + eps)
    r2 = tl.rsqrt(sum4 / count + eps)
    r3 = tl.rsqrt(sum6 / count + eps)
    tl.store(inverse_rms_ptr + row * 3, r1)
    tl.store(inverse_rms_ptr + row * 3 + 1, r2)
    tl.store(inverse_rms_ptr + row * 3 + 2, r3)
    return r1, r2, r3


@triton.jit
def _load_inverse_rms(inverse_rms_ptr, row):
    r1 = tl.load(inverse_rms_ptr + row * 3)
    r2 = tl.load(inverse_rms_ptr + row * 3 + 1)
    r3 = tl.load(inverse_rms_ptr + row * 3 + 2)
    return r1, r2, r3


@triton.jit
def _load_parameters(weight_ptr, bias_ptr):
    """Weights of x, x^2, x^3 (stored with the cube's first) and the bias."""
    w1 = tl.load(weight_ptr + 2).to(tl.float32)
    w2 = tl.load(weight_ptr + 1).to(tl.float32)
    w3 = tl.load(weight_ptr).to(tl.float32)
    return w1, w2, w3, tl.load(bias_ptr).to(tl.float32)


@triton.jit
def _gradient_sums(gradient, x, TOGETHER: tl.constexpr):
    """Sums of gradient times x, x^2, x^3, 1."""
    first = gradient * x
    second = first * x
    third = second * x
    if TOGETHER:
        s1, s2, s3, s0 = tl.reduce((first, second, third, gradient), 0, _add4)
    else:
        s1 = tl.sum(first)
        s2 = tl.sum(second)
        s3 = tl.sum(third)
        s0 = tl.sum(gradient)
    return s1, s2, s3, s0


@triton.jit
def _power_sums(x):
    """Sums of x^2, x^4, x^6."""
    x2 = x * x
    x4 = x2 * x2
    x6 = x4 * x2
    return tl.sum(x2), tl.sum(x4), tl.sum(x6)


@triton.jit
def _store_partial(partial_ptr, total3, total2, total1, total0):
    partial = partial_ptr + tl.program_id(0)
    tl.store(partial, total3)
    tl.store(partial + tl.num_programs(0), total2)
    tl.store(partial + 2 * tl.num_programs(0), total1)
    tl.store(partial + 3 * tl.num_programs(0), total0)


@triton.jit
def _polynomial(x, a1, a2, a3, bias):
    return bias + x * (a1 + x * (a2 + x * a3))


@triton.jit
def _input_gradient(gradient, x, r1, r2, r3, a1, a2, a3, s1, s2, s3, count):
    """Gradient of x; `sk` is the row's sum of gradient * x^k * rk. Grouped to keep within float32."""
    c1 = a1 * (s1 / count) * r1
    c2 = 2 * a2 * (s2 / count) * r2
    c3 = 3 * a3 * (s3 / count) * r3
    x2 = x * x
    return gradient * (a1 + x * (2 * a2 + x * (3 * a3))) - x * (c1 + x2 * (c2 + x2 * c3))


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x_ptr, up_ptr, weight_ptr, bias_ptr, y_ptr, inverse_rms_ptr,
    num_rows, num_columns, x_stride, up_stride, eps,
    HAS_UP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y (R, N) and inverse_rms (R, 3), each row held in registers."""
    columns = tl.arange(0, BLOCK)
    w1, w2, w3, bias = _load_parameters(weight_ptr, bias_ptr)
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        packed_x = _load_packed(x_ptr, row, x_stride, columns, num_columns)  # (BLOCK,)
        if HAS_UP:
            up = _load_packed(up_ptr, row, up_stride, columns, num_columns)
        sum2, sum4, sum6 = _power_sums(packed_x.to(tl.float32))
        r1, r2, r3 = _store_inverse_rms(inverse_rms_ptr, row, sum2, sum4, sum6, num_columns, eps)
        a1, a2, a3 = w1 * r1, w2 * r2, w3 * r3
        y = _polynomial(_again(packed_x, sum2, num_columns, PACKED), a1, a2, a3, bias)
        if HAS_UP:
            y *= up.to(tl.float32)
        tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=columns < num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    dy_ptr, x_ptr, up_ptr, weight_ptr, bias_ptr, inverse_rms_ptr, dx_ptr, dup_ptr, partial_ptr,
    num_rows, num_columns, dy_stride, x_stride, up_stride,
    HAS_UP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, TOGETHER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx (R, N), dup (R, N) and each program's share (4, P) of the weights' and bias's gradients."""
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    w1, w2, w3, bias = _load_parameters(weight_ptr, bias_ptr)
    total3 = 0.0
    total2 = 0.0
    total1 = 0.0
    total0 = 0.0
    next1, next2, next3 = _load_inverse_rms(inverse_rms_ptr, tl.program_id(0).to(tl.int64))
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        r1, r2, r3 = next1, next2, next3
        packed_dy = _load_packed(dy_ptr, row, dy_stride, columns, num_columns)  # (BLOCK,)
        packed_x = _load_packed(x_ptr, row, x_stride, columns, num_columns)
        # Carried by hand: a load that the compiler prefetches passes through shared memory and costs barriers.
        next1, next2, next3 = _load_inverse_rms(inverse_rms_ptr, tl.minimum(row + tl.num_programs(0), num_rows - 1))
        gradient = packed_dy.to(tl.float32)
        if HAS_UP:
            packed_up = _load_packed(up_ptr, row, up_stride, columns, num_columns)
            gradient *= packed_up.to(tl.float32)
        s1, s2, s3, s0 = _gradient_sums(gradient, packed_x.to(tl.float32), TOGETHER)
        s3 *= r3
        s2 *= r2
        s1 *= r1
        a1, a2, a3 = w1 * r1, w2 * r2, w3 * r3
        dy = _again(packed_dy, s0, num_columns, PACKED)
        x = _again(packed_x, s0, num_columns, PACKED)
        gradient = dy
        if HAS_UP:
            gradient = dy * _again(packed_up, s0, num_columns, PACKED)
        dx = _input_gradient(gradient, x, r1, r2, r3, a1, a2, a3, s1, s2, s3, num_columns)
        tl.store(dx_ptr + row * num_columns + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_UP:
            dup = dy * _polynomial(x, a1, a2, a3, bias)
            tl.store(dup_ptr + row * num_columns + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)
        total3 += s3
        total2 += s2
        total1 += s1
        total0 += s0
    _store_partial(partial_ptr, total3, total2, total1, total0)


@triton.jit(do_not_specialize=["num_rows"])
def long_forward_kernel(
    x_ptr, up_ptr, weight_ptr, bias_ptr, y_ptr, sums_ptr, inverse_rms_ptr,
    num_rows, num_columns, x_stride, up_stride, eps,
    REDUCE: tl.constexpr, APPLY: tl.constexpr, HAS_UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`REDUCE`: a row's sums of x^2, x^4, x^6, to `sums` (R, 3) or, going on, to `inverse_rms`; `APPLY`: y."""
    if APPLY:
        w1, w2, w3, bias = _load_parameters(weight_ptr, bias_ptr)
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        if REDUCE:
            sum2 = tl.zeros((BLOCK,), tl.float32)
            sum4 = tl.zeros((BLOCK,), tl.float32)
            sum6 = tl.zeros((BLOCK,), tl.float32)
            for start in tl.range(0, num_columns, BLOCK):
                x = _load_row(x_ptr, row, x_stride, start + tl.arange(0, BLOCK), num_columns)
                x2 = x * x
                sum2 += x2
                sum4 += x2 * x2
                sum6 += x2 * x2 * x2
            total2, total4, total6 = tl.sum(sum2), tl.sum(sum4), tl.sum(sum6)
            if APPLY:
                r1, r2, r3 = _store_inverse_rms(inverse_rms_ptr, row, total2, total4, total6, num_columns, eps)
            else:
                tl.store(sums_ptr + row * 3, total2)
                tl.store(sums_ptr + row * 3 + 1, total4)
                tl.store(sums_ptr + row * 3 + 2, total6)
        else:
            r1, r2, r3 = _load_inverse_rms(inverse_rms_ptr, row)
        if APPLY:
            a1, a2, a3 = w1 * r1, w2 * r2, w3 * r3
            for start in tl.range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = _load_row(x_ptr, row, x_stride, columns, num_columns)
                y = _polynomial(x, a1, a2, a3, bias)
                if HAS_UP:
                    y *= _load_row(up_ptr, row, up_stride, columns, num_columns)
                tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=columns < num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def long_backward_kernel(
    dy_ptr, x_ptr, up_ptr, weight_ptr, bias_ptr, inverse_rms_ptr, sums_ptr, dx_ptr, dup_ptr, partial_ptr,
    num_rows, num_columns, count, dy_stride, x_stride, up_stride,
    REDUCE: tl.constexpr, APPLY: tl.constexpr, HAS_UP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`REDUCE`: a row's four gradient sums, to `sums` (R, 4) or, going on, to `partial`; `APPLY`: dx, dup."""
    if APPLY:
        w1, w2, w3, bias = _load_parameters(weight_ptr, bias_ptr)
    total3 = 0.0
    total2 = 0.0
    total1 = 0.0
    total0 = 0.0
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        r1, r2, r3 = _load_inverse_rms(inverse_rms_ptr, row)
        if REDUCE:
            sum3 = tl.zeros((BLOCK,), tl.float32)
            sum2 = tl.zeros((BLOCK,), tl.float32)
            sum1 = tl.zeros((BLOCK,), tl.float32)
            sum0 = tl.zeros((BLOCK,), tl.float32)
            for start in tl.range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = _load_row(x_ptr, row, x_stride, columns, num_columns)
                gradient = _load_row(dy_ptr, row, dy_stride, columns, num_columns)
                if HAS_UP:
                    gradient *= _load_row(up_ptr, row, up_stride, columns, num_columns)
                first = gradient * x
                sum3 += first * x * x
                sum2 += first * x
                sum1 += first
                sum0 += gradient
            s3, s2, s1, s0 = tl.sum(sum3) * r3, tl.sum(sum2) * r2, tl.sum(sum1) * r1, tl.sum(sum0)
            if APPLY:
                total3 += s3
                total2 += s2
                total1 += s1
                total0 += s0
            else:
                tl.store(sums_ptr + row * 4, s3)
                tl.store(sums_ptr + row * 4 + 1, s2)
                tl.store(sums_ptr + row * 4 + 2, s1)
                tl.store(sums_ptr + row * 4 + 3, s0)
        else:
            s3 = tl.load(sums_ptr + row * 4)
            s2 = tl.load(sums_ptr + row * 4 + 1)
            s1 = tl.load(sums_ptr + row * 4 + 2)
        if APPLY:
            a1, a2, a3 = w1 * r1, w2 * r2, w3 * r3
            for start in tl.range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < num_columns
                x = _load_row(x_ptr, row, x_stride, columns, num_columns)
                dy = _load_row(dy_ptr, row, dy_stride, columns, num_columns)
                gradient = dy
                if HAS_UP:
                    gradient = dy * _load_row(up_ptr, row, up_stride, columns, num_columns)
                    dup = dy * _polynomial(x, a1, a2, a3, bias)
                    tl.store(dup_ptr + row * num_columns + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)
                dx = _input_gradient(gradient, x, r1, r2, r3, a1, a2, a3, s1, s2, s3, count)
                tl.store(dx_ptr + row * num_columns + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if REDUCE and APPLY:
        _store_partial(partial_ptr, total3, total2, total1, total0)


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(partial_ptr, dweight_ptr, dbias_ptr, num_partials, BLOCK: tl.constexpr):
    """dweight (3,) and dbias (1,) from the programs' shares (4, P), in a fixed order."""
    sum3 = tl.zeros((BLOCK,), tl.float32)
    sum2 = tl.zeros((BLOCK,), tl.float32)
    sum1 = tl.zeros((BLOCK,), tl.float32)
    sum0 = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, num_partials, BLOCK):
        programs = start + tl.arange(0, BLOCK)
        inside = programs < num_partials
        sum3 += tl.load(partial_ptr + programs, mask=inside, other=0.0)
        sum2 += tl.load(partial_ptr + num_partials + programs, mask=inside, other=0.0)
        sum1 += tl.load(partial_ptr + 2 * num_partials + programs, mask=inside, other=0.0)
        sum0 += tl.load(partial_ptr + 3 * num_partials + programs, mask=inside, other=0.0)
    total3, total2, total1, total0 = tl.sum(sum3), tl.sum(sum2), tl.sum(sum1), tl.sum(sum0)
    tl.store(dweight_ptr, total3.to(dweight_ptr.dtype.element_ty))
    tl.store(dweight_ptr + 1, total2.to(dweight_ptr.dtype.element_ty))
    tl.store(dweight_ptr + 2, total1.to(dweight_ptr.dtype.element_ty))
    tl.store(dbias_ptr, total0.to(dbias_ptr.dtype.element_ty))
