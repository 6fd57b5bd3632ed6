"""Layers for the `kernels` library: pure forwards that read the parameters of the module they are put into."""

import torch
from torch import nn

from .ops import poly_norm, poly_norm_mul


class PolyNorm(nn.Module):
    """Forward of a PolyNorm module with `weight` (3,), `bias` (1,) and `eps`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return poly_norm(x, self.weight, self.bias, self.eps)


class FusedMulPolyNorm(nn.Module):
    """Forward of a gated PolyNorm module, `poly_norm(x) * mul`, with `weight` (3,), `bias` (1,) and `eps`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor, mul: torch.Tensor) -> torch.Tensor:
        return poly_norm_mul(x, mul, self.weight, self.bias, self.eps)
