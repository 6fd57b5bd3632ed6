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
        model: a Motif-2 model on its device, neither in FP8 nor sharded, and not yet run; what replaced a linear
            layer's forward before keeps it and is left alone, but for `merge_projections`.
    """

    def __init__(self, model: nn.Module):
        self._copies: list[torch.Tensor] = []
        self._weights: list[nn.Parameter] = []
        for module in model.modules():
            if isinstance(module, nn.Linear) and "forward" not in vars(module):
                module.forward = _product_with_copy(module)
                module.__dict__["joined_weight"] = self._copy([module])
            elif len(vars(module).get("joined", ())) > 1:
                module.__dict__["joined_weight"] = self._copy(module.joined)
        self.refresh()

    def _copy(self, modules: list[nn.Linear]) -> torch.Tensor:
        """An uninitialised copy of the modules' weights, one below the other, whose gradient goes to them."""
        weights = [module.weight for module in modules]
        rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
        copy = torch.empty(rows, columns, dtype=torch.bfloat16, device=weights[0].device)
        self._copies += copy.split([len(weight) for weight in weights])
        self._weights += weights
        if any(weight.requires_grad for weight in weights):
            copy.requires_grad_().register_post_accumulate_grad_hook(functools.partial(_hand_over, weights))
        return copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now."""
        torch._foreach_copy_(self._copies, self._weights)


def _product_with_copy(module: nn.Linear):
    """A forward; a closure, since layers with partial functions would not share their compiled code."""

    def product(rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, module.joined_weight, module.bias)

    return product


@torch.no_grad()
def _hand_over(weights: list[nn.Parameter], copy: torch.Tensor) -> None:
    """Add the gradient of a copy to those of its weights."""
    for weight, gradient in zip(weights, copy.grad.split([len(weight) for weight in weights]), strict=True):
        if not weight.requires_grad:
            continue
        if weight.grad is None:
            weight.grad = gradient.to(weight.dtype)
        else:
            weight.grad += gradient
    copy.grad = None
