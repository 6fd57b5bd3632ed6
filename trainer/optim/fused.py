"""The elementwise ends of a Muon step, each one pass over memory: Triton on accelerators, torch elsewhere.

Prologue: momentum, Nesterov and the cast into the send buffer. Epilogue: weight decay and the update.
"""

import torch
from torch import Tensor


def nesterov(gradient: Tensor, momentum_buffer: Tensor, momentum: float, out: Tensor | None) -> None:
    """Advance the momentum in place and write the Nesterov direction.

    Args:
        gradient: local shard (rows, columns).
        momentum_buffer: same shape; becomes momentum * momentum_buffer + gradient.
        momentum: decay of the buffer.
        out: where gradient + momentum * momentum_buffer goes, same shape, any dtype; None where nobody asks for it.
    """
    if _fusable(gradient, momentum_buffer, out):
        from trainer.optim import fused_kernels  # needs Triton, which machines without an accelerator may lack

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


def _fusable(*tensors: Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    plain = all(t.is_contiguous() and t.dtype != torch.float64 for t in present)
    return plain and present[0].is_cuda and present[0].numel() > 0
