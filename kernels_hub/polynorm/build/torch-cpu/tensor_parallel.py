"""PolyNorm of rows whose columns lie on several ranks: one message forward, one backward.

Forward sends the sums of x^2, x^4, x^6 (3 float32 a row), backward a row's four gradient sums (4 float32 a row). As
these are complete on every rank, so are the gradients of weight and bias: they must not be added over the ranks again.
"""

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from . import ops


def _add_over_ranks(sums: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return collectives.wait_tensor(collectives.all_reduce(sums, "sum", group))


class _Gradients(torch.autograd.Function):
    """Gradients of x, up, weight and bias, as a function of its own that has no gradient: else one would be 0."""

    @staticmethod
    def forward(ctx, dy, x, up, weight, bias, inverse_rms, count, group):
        sums = _add_over_ranks(ops.gradient_sums(dy, x, up, inverse_rms), group)
        dx, *dup = ops.input_gradients(dy, x, up, weight, bias, inverse_rms, sums, count)
        totals = sums.reshape(-1, 4).sum(0)
        dbias = totals[3:].to(bias.dtype).reshape(bias.shape)
        return dx, dup[0] if dup else None, totals[:3].to(weight.dtype), dbias

    @staticmethod
    def backward(ctx, *gradients):
        ops._refuse_double_backward(ctx)


class _TensorParallelPolyNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, weight, bias, eps, group):
        ctx.group = group
        ctx.count = x.shape[-1] * dist.get_world_size(group)
        inverse_rms = torch.rsqrt(_add_over_ranks(ops.power_sums(x), group) / ctx.count + eps)
        ctx.save_for_backward(x, up, weight, bias, inverse_rms)
        return ops.apply(x, up, weight, bias, inverse_rms)

    @staticmethod
    def backward(ctx, dy):
        return *_Gradients.apply(dy, *ctx.saved_tensors, ctx.count, ctx.group), None, None


def poly_norm(x, weight, bias, eps: float = 1e-6, *, group: dist.ProcessGroup) -> torch.Tensor:
    """PolyNorm of rows split evenly over the ranks of `group`.

    Args:
        x: (..., N / ranks) this rank's columns; every rank holds equally many.
        weight: (3,) the same on every rank.
        bias: (1,) the same on every rank.
        eps: added to each mean square.
        group: the ranks that share a row.

    Returns:
        torch.Tensor: this rank's columns of the result, like x.

    Raises:
        ValueError: as `ops.poly_norm`.
    """
    ops._check(x, None, weight, bias)
    return _TensorParallelPolyNorm.apply(x, None, weight, bias, eps, group)


def poly_norm_mul(x, up, weight, bias, eps: float = 1e-6, *, group: dist.ProcessGroup) -> torch.Tensor:
    """PolyNorm of rows split evenly over the ranks of `group`, times this rank's columns of `up`.

    Args:
        x: (..., N / ranks) this rank's columns; every rank holds equally many.
        up: shape and type of x.
        weight: (3,) the same on every rank.
        bias: (1,) the same on every rank.
        eps: added to each mean square.
        group: the ranks that share a row.

    Returns:
        torch.Tensor: this rank's columns of the result, like x.

    Raises:
        ValueError: as `ops.poly_norm_mul`.
    """
    ops._check(x, up, weight, bias)
    return _TensorParallelPolyNorm.apply(x, up, weight, bias, eps, group)
