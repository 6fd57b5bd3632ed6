"""Launches of the Triton kernels: shapes and strides to rows, and how many warps and programs a row gets.

Shapes: R rows (all leading dimensions as one), N columns (the dimension of the means), P programs.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from . import triton_kernels as kernels

INTERPRETED = triton.knobs.runtime.interpret
HAS_PTX = torch.version.hip is None and not INTERPRETED
REGISTER_BYTES = 160 * 1024  # float32 inputs of one row; assumption: a longer row would spill
TILE = 4096  # columns a step in the kernels that read a row twice; assumption


class Plan(NamedTuple):
    """How a kernel is launched.

    Args:
        warps: warps a program.
        programs: programs a multiprocessor, at most; they share the rows.
        stages: depth of the prefetch of rows into shared memory; 1 loads without it.
        block: columns held at once; less than a row means that the row is read twice.
        packed: a row waits for its sums in 16 bits an element, not as float32; needs PTX.
        together: the backward's one reduction for all sums of a row instead of one for each.
    """

    warps: int
    programs: int
    stages: int
    block: int
    packed: bool = False
    together: bool = False


def plan(num_rows: int, num_columns: int, element_size: int, has_up: bool, backward: bool, shared_bytes: int) -> Plan:
    """Chooses the launch for rows of `num_columns` elements of `element_size` bytes.

    The choices for 16-bit rows of 16384 were measured on an H100 (`benchmarks/polynorm.py --sweep`). Without PTX
    (ROCm, Triton's interpreter) or with less shared memory they do not apply, and no launch is packed.

    Args:
        num_rows: R.
        num_columns: N.
        element_size: bytes.
        has_up: there is a second factor.
        backward: for the backward, which also reads dy.
        shared_bytes: shared memory that a program may have.
    """
    block = triton.next_power_of_2(max(num_columns, 16))
    num_inputs = 1 + has_up + backward
    if 4 * num_inputs * block > REGISTER_BYTES + 32 * 1024 * (num_inputs == 3):
        return Plan(warps=16, programs=4, stages=1, block=TILE)
    if block == 16384 and element_size == 2 and HAS_PTX and shared_bytes >= 220 * 1024:
        if backward and has_up:
            return Plan(warps=16, programs=8, stages=1, block=block, packed=True, together=True)
        if backward:
            return Plan(warps=16, programs=2, stages=1, block=block, together=True)
        if has_up:
            few = num_rows <= 4096
            return Plan(warps=8, programs=8, stages=1 if few else 3, block=block, packed=few)
        return Plan(warps=16, programs=1024, stages=1, block=block, packed=True)
    warps = min(16, max(1, block // 512))
    fitting = 1 + max(0, shared_bytes - 16 * 1024) // (num_inputs * block * element_size)
    stages = 1 if block < 8192 else min(3, fitting)
    return Plan(warps, programs=1 if stages > 1 else 16, stages=stages, block=block, together=has_up and HAS_PTX)


@cache
def _multiprocessors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; 0 in the interpreter, which prefetches nothing."""
    if device.type == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def _grid(rows: torch.Tensor, chosen: Plan) -> tuple[int]:
    return (min(rows.shape[0], chosen.programs * _multiprocessors(rows.device)),)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """View of `tensor` as (R, N) with unit stride along N; a copy only where no such view exists."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def _second(up: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Rows of the second factor, or `x` as a pointer that nobody reads; and whether there is one."""
    return (x, False) if up is None else (_rows(up), True)


def _plan_of_parts(x: torch.Tensor) -> Plan:
    """The launch of sums alone, or of what follows from sums that are known; x (R, N)."""
    return Plan(warps=8, programs=8, stages=1, block=min(TILE, triton.next_power_of_2(x.shape[1])))


def forward(x, up, weight, bias, eps, chosen=None):
    """y like x, and inverse_rms (*x.shape[:-1], 3) float32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse_rms = torch.empty((*x.shape[:-1], 3), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, inverse_rms.fill_(eps).rsqrt_()
    x, weight = _rows(x), weight.contiguous()
    up, has_up = _second(up, x)
    num_rows, num_columns = x.shape
    chosen = chosen or plan(num_rows, num_columns, x.element_size(), has_up, False, _shared_bytes(x.device))
    strides = (x.stride(0), up.stride(0))
    with torch.cuda.device_of(x):
        if chosen.block >= num_columns:
            kernels.forward_kernel[_grid(x, chosen)](
                x, up, weight, bias, y, inverse_rms, num_rows, num_columns, *strides, eps,
                HAS_UP=has_up, BLOCK=chosen.block, STAGES=chosen.stages, PACKED=chosen.packed, num_warps=chosen.warps,
            )  # fmt: skip
        else:
            kernels.long_forward_kernel[_grid(x, chosen)](
                x, up, weight, bias, y, inverse_rms, inverse_rms, num_rows, num_columns, *strides, eps,
                REDUCE=True, APPLY=True, HAS_UP=has_up, BLOCK=chosen.block, num_warps=chosen.warps,
            )  # fmt: skip
    return y, inverse_rms


def backward(dy, x, up, weight, bias, inverse_rms, chosen=None):
    """[dx, dweight, dbias], and dup where there is an up; the gradients have the types of what they belong to."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if x.numel() == 0:
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
        return [dx, dweight, dbias] if up is None else [dx, dweight, dbias, dup]
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    dy, x, weight = _rows(dy), _rows(x), weight.contiguous()
    up, has_up = _second(up, x)
    num_rows, num_columns = x.shape
    chosen = chosen or plan(num_rows, num_columns, x.element_size(), has_up, True, _shared_bytes(x.device))
    grid = _grid(x, chosen)
    partial = torch.empty((4, grid[0]), dtype=torch.float32, device=x.device)
    strides = (dy.stride(0), x.stride(0), up.stride(0))
    with torch.cuda.device_of(x):
        if chosen.block >= num_columns:
            kernels.backward_kernel[grid](
                dy, x, up, weight, bias, inverse_rms, dx, dx if dup is None else dup, partial,
                num_rows, num_columns, *strides,
                HAS_UP=has_up, BLOCK=chosen.block, STAGES=chosen.stages, TOGETHER=chosen.together,
                PACKED=chosen.packed, num_warps=chosen.warps,
            )  # fmt: skip
        else:
            kernels.long_backward_kernel[grid](
                dy, x, up, weight, bias, inverse_rms, inverse_rms, dx, dx if dup is None else dup, partial,
                num_rows, num_columns, num_columns, *strides,
                REDUCE=True, APPLY=True, HAS_UP=has_up, BLOCK=chosen.block, num_warps=chosen.warps,
            )  # fmt: skip
        kernels.sum_partials_kernel[(1,)](partial, dweight, dbias, grid[0], BLOCK=256, num_warps=4)
    return [dx, dweight, dbias] if dup is None else [dx, dweight, dbias, dup]


def power_sums(x):
    """Sums of x^2, x^4, x^6 over the last dimension: (*x.shape[:-1], 3) float32."""
    sums = torch.empty((*x.shape[:-1], 3), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return sums.zero_()
    x = _rows(x)
    chosen = _plan_of_parts(x)
    with torch.cuda.device_of(x):
        kernels.long_forward_kernel[_grid(x, chosen)](
            x, x, x, x, x, sums, sums, *x.shape, x.stride(0), 0, 0.0,
            REDUCE=True, APPLY=False, HAS_UP=False, BLOCK=chosen.block, num_warps=chosen.warps,
        )  # fmt: skip
    return sums


def apply(x, up, weight, bias, inverse_rms):
    """y like x, from inverse root mean squares (*x.shape[:-1], 3) that are already known."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, weight = _rows(x), weight.contiguous()
    up, has_up = _second(up, x)
    chosen = _plan_of_parts(x)
    with torch.cuda.device_of(x):
        kernels.long_forward_kernel[_grid(x, chosen)](
            x, up, weight, bias, y, inverse_rms, inverse_rms, *x.shape, x.stride(0), up.stride(0), 0.0,
            REDUCE=False, APPLY=True, HAS_UP=has_up, BLOCK=chosen.block, num_warps=chosen.warps,
        )  # fmt: skip
    return y


def gradient_sums(dy, x, up, inverse_rms):
    """A row's shares of the gradients of the three weights and the bias: (*x.shape[:-1], 4) float32."""
    sums = torch.empty((*x.shape[:-1], 4), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return sums.zero_()
    dy, x = _rows(dy), _rows(x)
    up, has_up = _second(up, x)
    chosen = _plan_of_parts(x)
    with torch.cuda.device_of(x):
        kernels.long_backward_kernel[_grid(x, chosen)](
            dy, x, up, x, x, inverse_rms, sums, x, x, sums,
            *x.shape, x.shape[1], dy.stride(0), x.stride(0), up.stride(0),
            REDUCE=True, APPLY=False, HAS_UP=has_up, BLOCK=chosen.block, num_warps=chosen.warps,
        )  # fmt: skip
    return sums


def input_gradients(dy, x, up, weight, bias, inverse_rms, sums, count):
    """[dx], and dup where there is an up, from sums (*x.shape[:-1], 4) over rows of `count` columns in all."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if x.numel() > 0:
        dy, x, weight = _rows(dy), _rows(x), weight.contiguous()
        up, has_up = _second(up, x)
        chosen = _plan_of_parts(x)
        with torch.cuda.device_of(x):
            kernels.long_backward_kernel[_grid(x, chosen)](
                dy, x, up, weight, bias, inverse_rms, sums, dx, dx if dup is None else dup, sums,
                *x.shape, count, dy.stride(0), x.stride(0), up.stride(0),
                REDUCE=False, APPLY=True, HAS_UP=has_up, BLOCK=chosen.block, num_warps=chosen.warps,
            )  # fmt: skip
    return [dx] if dup is None else [dx, dup]
