"""The elementwise parts of a Muon step, each one pass over memory: Triton on accelerators, torch elsewhere.

Before: are all gradients finite? Prologue: momentum, Nesterov and the cast into the send buffer. Epilogue: weight
decay and the update. After: rows of clipped heads.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def not_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """1 where any of the tensors holds a NaN or an infinity, else 0: float32 of shape (1,) on `device`."""
    flag = torch.zeros(1, device=device)
    rest = [tensor for tensor in tensors if tensor.numel()]
    if device.type == "cuda":
        from trainer.optim import fused_kernels  # needs Triton, which machines without an accelerator may lack

        fused, rest = rest, []
        for dtype in {tensor.dtype for tensor in fused}:
            same = [tensor for tensor in fused if tensor.dtype == dtype]
            here = {tensor.device for tensor in same} == {flag.device}
            if here and dtype in _FUSED_DTYPES and all(map(Tensor.is_contiguous, same)):
                fused_kernels.mark_not_finite(same, flag)
            else:
                rest += same
    if rest:
        largest = get_total_norm(rest, norm_type=math.inf).to(device)
        flag = torch.maximum(flag, (~largest.isfinite()).float())
    return flag


def nesterov(gradient: Tensor, momentum_buffer: Tensor, momentum: float, out: Tensor | None) -> None:
    """Advance the momentum in place and write the Nesterov direction.

    Args:
        gradient: local shard (rows, columns).
        momentum_buffer: same shape; becomes momentum * momentum_buffer + gradient.
        momentum: decay of the buffer.
        out: where gradient + momentum * momentum_buffer goes, same shape, any dtype; None where nobody asks for it.
    """
    if _fusable(gradient, momentum_buffer, out):
        from trainer.optim import fused_kernels

        fused_kernels.nesterov(gradient, momentum_buffer, momentum, out)
        return
    momentum_buffer.mul_(momentum).add_(gradient)
    if out is not None:
        out.copy_(torch.add(gradient, momentum_buffer, alpha=momentum))


def apply_update(weight: Tensor, update: Tensor, decay: float, step_size: float) -> None:
    """weight = decay * weight - step_size * update, in place; `update` may have a dtype of less precision."""
    if _fusable(weight, update):
        from trainer.optim import fused_kernels

        fused_kernels.apply_update(weight, update, decay, step_size)
        return
    weight.mul_(decay).add_(update.to(weight.dtype), alpha=-step_size)


def scale_rows(weight: Tensor, factors: Tensor) -> None:
    """Multiply the rows of `weight` (rows, columns) by `factors` (rows,), in place."""
    if _fusable(weight) and factors.is_contiguous():
        from trainer.optim import fused_kernels

        fused_kernels.scale_rows(weight, factors)
        return
    weight.mul_(factors[:, None])


def _fusable(*tensors: Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    plain = all(t.is_contiguous() and t.dtype in _FUSED_DTYPES for t in present)
    return plain and present[0].is_cuda and present[0].numel() > 0
