"""Keeps the layout of a gradient that a compiler may change.

cuDNN's attention backward in PyTorch 2.11 plans for the strides of the first output gradient that it sees of a shape.
Another layout later, as torch.compile chooses it, gives wrong gradients without a word (NaN on an H200). Here the
gradient of an attention's output always lies in memory as the output does: token after token.

Shapes: B batch, T tokens, H heads, D head dimension.
"""

import torch


@torch.library.custom_op("motif2::tokens_first", mutates_args=())
def _tokens_first(gradient: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of (B, T, H, D). An operator of its own, so that no compiler chooses another layout."""
    return gradient.clone(memory_format=torch.contiguous_format)


@_tokens_first.register_fake
def _(gradient):
    return gradient.new_empty(gradient.shape)


class _KeepLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _tokens_first(gradient)


def keep_gradient_layout(output: torch.Tensor) -> torch.Tensor:
    """Returns `output` (B, T, H, D), whose gradient will be contiguous however the program is compiled."""
    return _KeepLayout.apply(output)
