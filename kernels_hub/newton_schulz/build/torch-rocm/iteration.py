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
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        addend: torch.Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
    ) -> torch.Tensor:
        """alpha * left @ right + beta * addend + gamma * I, (S, S)."""

    def shift(self, matrix: torch.Tensor, amount: float) -> torch.Tensor:
        """matrix + amount * I in a new tensor, (S, S)."""

    def apply(self, left: torch.Tensor, last: bool = False) -> None:
        """X becomes left @ X, (S, L); with `last` it goes to the result instead."""


def classic_iteration(products: Products, steps: tuple[Step, ...]) -> None:
    """X <- (a I + b X X' + c (X X')^2) X for each step, on X itself."""
    for index, (a, b, c) in enumerate(steps):
        gram = products.gram()  # (S, S)
        polynomial = products.symmetric(gram, gram, gram, alpha=c, beta=b, gamma=a)  # (S, S)
        products.apply(polynomial, last=index == len(steps) - 1)


def gram_iteration(products: Products, steps: tuple[Step, ...], restarts: tuple[int, ...]) -> None:
    """The same iteration on R = X X' and an accumulated factor Q, in (S, S) products only; X is touched at restarts.

    A step multiplies X by P = a I + b R + c R^2: it takes Q to Q P, and R to P R P, in products that commute. Rounding
    lets R drift from the Gram matrix of Q X, so before the steps in `restarts` X becomes Q X and R is computed anew;
    without any the drift grows until the result is useless. In the step after a restart the error would nearly double
    if P R P were computed from a P whose diagonal was rounded with a I in it: there P - a I is kept, and Q is
    `factor` + `apart` I.
    """
    gram, factor, apart = products.gram(), None, 0.0  # (S, S)
    for index, (a, b, c) in enumerate(steps):
        goes_on = index + 1 < len(steps) and index + 1 not in restarts
        if index in restarts:
            products.apply(products.shift(factor, apart) if apart else factor)
            gram = products.gram()
            factor, apart = products.symmetric(gram, gram, gram, alpha=c, beta=b), a  # P - a I, (S, S)
            if goes_on:
                gram = products.symmetric(gram, factor, gram, beta=a)  # R P
                gram = products.symmetric(factor, gram, gram, beta=a)
            continue
        polynomial = products.symmetric(gram, gram, gram, alpha=c, beta=b, gamma=a)  # P, (S, S)
        if factor is None:
            factor = polynomial
        else:
            factor = products.symmetric(factor, polynomial, polynomial if apart else None, beta=apart)
            apart = 0.0
        if goes_on:
            gram = products.symmetric(products.symmetric(gram, polynomial), polynomial)
    products.apply(products.shift(factor, apart) if apart else factor, last=True)
