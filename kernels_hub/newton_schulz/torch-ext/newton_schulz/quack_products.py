"""Products through quack's `gemm_symmetric` (CuTe DSL), an optional backend for Hopper and Blackwell.

Shapes: N matrices in the batch, S rows, L columns, S <= L.
"""

import torch
from quack.gemm_interface import gemm_symmetric

from .triton_products import TritonProducts


class QuackProducts(TritonProducts):
    """`TritonProducts` with the symmetric products of another library; buffers, norm and `left @ X` are the same."""

    def gram(self) -> torch.Tensor:
        return gemm_symmetric(self.x, self.x.mT)  # (N, S, S)

    def symmetric(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        addend: torch.Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
    ) -> torch.Tensor:
        value = gemm_symmetric(left, right, C=addend, alpha=float(alpha), beta=float(beta))  # (N, S, S)
        return self.shift(value, gamma) if gamma else value
