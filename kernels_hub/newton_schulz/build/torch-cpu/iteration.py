"""The two forms of the iteration, written over the products a backend offers.

Shapes: S rows, L columns, S <= L; a backend may carry a batch dimension in front.
"""

from typing import Protocol

import torch

from .coefficients import Step


class Products(Protocol):
    """What an iteration needs of a backend. All operands of `symmetric` commute and are symmetric."""

    def gram(self) -> torch.Tensor:
        """X X' of the current X, (S, S)."""

    def symmetric(
        self, left: torch.Tensor, right: torch.Tensor, addend: torch.Tensor, alpha: float = 1.0, beta: float = 1.0
    ) -> torch.Tensor:
        """alpha * left @ right + beta * addend, (S, S)."""

    def shift(self, matrix: torch.Tensor, amount: float) -> torch.Tensor:
        """matrix + amount * I in a new tensor, (S, S)."""

    def apply(self, left: torch.Tensor, beta: float = 0.0, last: bool = False) -> None:
        """X becomes left @ X + beta * X, (S, L); with `last` it goes to the result instead."""


def classic_iteration(products: Products, steps: tuple[Step, ...]) -> None:
    """X <- a X + (b X X' + c (X X')^2) X for each step, on X itself."""
    for index, (a, b, c) in enumerate(steps):
        gram = products.gram()  # (S, S)
        polynomial = products.symmetric(gram, gram, gram, alpha=c, beta=b)  # (S, S)
        products.apply(polynomial, beta=a, last=index == len(steps) - 1)


def gram_iteration(products: Products, steps: tuple[Step, ...], restarts: tuple[int, ...]) -> None:
    """The same iteration on R = X X' and an accumulated factor Q, in (S, S) products only; X is touched at restarts.

    A step multiplies X by Z + a I, Z = b R + c R^2. It takes Q to Q Z + a Q, and R to (Z + a I) R (Z + a I), in two
    products that commute. Rounding lets R drift from the Gram matrix of Q X, so before the steps in `restarts` X
    becomes Q X and R is computed anew; without any the drift grows until the result is useless.
    """
    gram = products.gram()  # (S, S)
    factor = None
    for index, (a, b, c) in enumerate(steps):
        if index in restarts:
            products.apply(factor)
            gram = products.gram()
            factor = None
        polynomial = products.symmetric(gram, gram, gram, alpha=c, beta=b)  # (S, S)
        if factor is None:
            factor = products.shift(polynomial, a)
        else:
            factor = products.symmetric(factor, polynomial, factor, beta=a)
        if index + 1 < len(steps) and index + 1 not in restarts:
            gram = products.symmetric(gram, polynomial, gram, beta=a)  # Z R + a R
            gram = products.symmetric(polynomial, gram, gram, beta=a)
    products.apply(factor, last=True)
