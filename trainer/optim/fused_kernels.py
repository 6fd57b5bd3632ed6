"""Triton twins of `trainer.optim.fused`: flat elementwise passes, computed in float32."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_PROGRAMS_A_TENSOR = 64
_POINTERS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def nesterov(gradient: Tensor, momentum_buffer: Tensor, momentum: float, out: Tensor | None) -> None:
    """See `trainer.optim.fused.nesterov`; all tensors contiguous."""
    numel = gradient.numel()
    target = momentum_buffer if out is None else out
    grid = (triton.cdiv(numel, _BLOCK),)
    with _device_of(gradient):
        _nesterov_kernel[grid](gradient, momentum_buffer, target, numel, momentum, out is not None, _BLOCK)


def apply_update(weight: Tensor, update: Tensor, decay: float, step_size: float) -> None:
    """See `trainer.optim.fused.apply_update`; all tensors contiguous."""
    numel = weight.numel()
    with _device_of(weight):
        _apply_update_kernel[(triton.cdiv(numel, _BLOCK),)](weight, update, numel, decay, step_size, _BLOCK)


def scale_rows(weight: Tensor, factors: Tensor) -> None:
    """See `trainer.optim.fused.scale_rows`; `weight` contiguous. Rows whose factor is 1 are not read."""
    rows, columns = weight.shape
    with _device_of(weight):
        _scale_rows_kernel[(rows,)](weight, factors, columns, _BLOCK)


def mark_not_finite(tensors: Sequence[Tensor], flag: Tensor) -> None:
    """Set `flag` (1,) to 1 where a tensor holds a NaN or an infinity; all contiguous and of one dtype.

    One launch for all of them: a model has hundreds, most of them small.
    """
    table = torch.tensor([[t.data_ptr() for t in tensors], [t.numel() for t in tensors]])  # (2, T)
    table = table.to(flag.device, non_blocking=True)
    element = _POINTERS[tensors[0].dtype]
    with _device_of(flag):
        _mark_not_finite_kernel[(_PROGRAMS_A_TENSOR, len(tensors))](table[0], table[1], flag, element, _BLOCK)


def _device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _nesterov_kernel(gradient, momentum_buffer, out, numel, momentum, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    g = tl.load(gradient + offsets, mask).to(tl.float32)
    m = tl.load(momentum_buffer + offsets, mask).to(tl.float32) * momentum + g
    tl.store(momentum_buffer + offsets, m.to(momentum_buffer.dtype.element_ty), mask)
    if WRITE:
        tl.store(out + offsets, (g + momentum * m).to(out.dtype.element_ty), mask)


@triton.jit
def _apply_update_kernel(weight, update, numel, decay, step_size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    w = tl.load(weight + offsets, mask).to(tl.float32)
    u = tl.load(update + offsets, mask).to(tl.float32)
    tl.store(weight + offsets, (decay * w - step_size * u).to(weight.dtype.element_ty), mask)


@triton.jit
def _scale_rows_kernel(weight, factors, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    if factor != 1.0:
        for start in tl.range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            place = weight + row * columns + column
            scaled = tl.load(place, column < columns).to(tl.float32) * factor
            tl.store(place, scaled.to(weight.dtype.element_ty), column < columns)


@triton.jit
def _mark_not_finite_kernel(addresses, sizes, flag, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    tensor = tl.program_id(1)
    numel = tl.load(sizes + tensor)
    source = tl.load(addresses + tensor).to(tl.pointer_type(ELEMENT))
    zeros = tl.zeros((BLOCK,), dtype=tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        offsets = start + tl.arange(0, BLOCK)
        zeros += (
            tl.load(source + offsets, offsets < numel, other=0.0).to(tl.float32) * 0.0
        )  # NaN * 0 and inf * 0 are NaN
    total = tl.sum(zeros)
    tl.store(flag, 1.0, total != total)
