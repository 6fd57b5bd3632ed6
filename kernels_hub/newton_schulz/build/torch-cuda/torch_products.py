"""Plain torch products of one matrix: the twin of the kernels for every device, and in float64 their reference.

Shapes: S rows, L columns, S <= L.
"""

import torch


class TorchProducts:
    """Products of one matrix in one data type. Half types on the CPU are multiplied in float32 and rounded once.

    Args:
        source: (rows, columns), any floating type, either orientation.
        result: (rows, columns), where `apply(last=True)` writes.
        dtype: type of every stored intermediate.
        eps: added to the Frobenius norm.
    """

    def __init__(self, source: torch.Tensor, result: torch.Tensor, dtype: torch.dtype, eps: float):
        wide = torch.promote_types(dtype, torch.float32)
        self.product_dtype = wide if source.device.type == "cpu" else dtype
        self.dtype = dtype
        self.result = result
        self.transposed = source.size(0) > source.size(1)
        x = (source.mT if self.transposed else source).to(wide).contiguous()  # (S, L)
        self.x = (x / (torch.linalg.vector_norm(x) + eps)).to(dtype)

    def gram(self) -> torch.Tensor:
        return self.symmetric(self.x, self.x.mT)  # (S, S)

    def symmetric(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        addend: torch.Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
    ) -> torch.Tensor:
        left, right = left.to(self.product_dtype), right.to(self.product_dtype)
        if addend is None:
            value = torch.mm(left, right)
            if alpha != 1:
                value *= alpha
        else:
            value = torch.addmm(addend.to(self.product_dtype), left, right, alpha=alpha, beta=beta)
        if gamma:
            value.diagonal().add_(gamma)
        return value.to(self.dtype)  # (S, S)

    def shift(self, matrix: torch.Tensor, amount: float) -> torch.Tensor:
        diagonal = matrix.diagonal().to(torch.promote_types(self.dtype, torch.float32)) + amount  # (S,)
        return matrix.diagonal_scatter(diagonal.to(self.dtype))  # (S, S)

    def apply(self, left: torch.Tensor, last: bool = False) -> None:
        self.x = torch.mm(left.to(self.product_dtype), self.x.to(self.product_dtype)).to(self.dtype)  # (S, L)
        if last:
            self.result.copy_(self.x.mT if self.transposed else self.x)
