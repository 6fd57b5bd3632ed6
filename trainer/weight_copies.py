"""Copies of a model's matrices in bfloat16, cast once a step, for its products.

Autocast casts every matrix in each micro-batch, and each gradient back before it is added. With copies the products
take and give the same numbers, with less traffic: one cast a step, and each gradient is added as it comes.
"""

import functools

import torch
from torch import nn


class WeightCopies:
    """Lets the linear layers of a model compute with bfloat16 copies of their weights, which stay the parameters.

    Names, optimizer and checkpoints do not change. After the weights changed `refresh` must be called.

    Args:
        model: a Motif-2 model on its device, neither in FP8 nor sharded, and not yet run.
    """

    def __init__(self, model: nn.Module):
        modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._weights = [module.weight for module in modules]
        self._copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in self._weights]
        for module, weight, copy in zip(modules, self._weights, self._copies, strict=True):
            copy.requires_grad_(weight.requires_grad)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(functools.partial(_hand_over, weight))
            module.__dict__["weight_copy"] = copy
            module.forward = _product_with_copy(module)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now."""
        torch._foreach_copy_(self._copies, self._weights)


def _product_with_copy(module: nn.Linear):
    """A forward; a closure, since layers with partial functions would not share their compiled code."""

    def product(rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, module.weight_copy, module.bias)

    return product


@torch.no_grad()
def _hand_over(weight: nn.Parameter, copy: torch.Tensor) -> None:
    """Add the gradient of a copy to that of its weight."""
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad += copy.grad
    copy.grad = None
