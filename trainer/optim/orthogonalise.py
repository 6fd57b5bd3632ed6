"""Newton-Schulz as the parallel optimizer calls it: which kernels, in which dtype."""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.optim.muon_clip_reference import newton_schulz_reference

METHODS = ("classic", "gram")


class Orthogonaliser:
    """Newton-Schulz with settings checked once.

    Args:
        method: "gram" or "classic".
        coefficients: (a, b, c) of each step.
        backend: of the kernels.

    Raises:
        ValueError: an unknown method, or coefficients that are no triples.
    """

    def __init__(self, method: str, coefficients: Iterable, backend: str):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}: choose one of {METHODS}")
        self.method, self.coefficients, self.backend = method, coefficients, backend

    def result_dtype(self, wire_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype of updates: what the kernels compute in, which is also what travels back."""
        if device.type == "cpu":
            return wire_dtype
        return torch.float16 if self.method == "gram" else torch.bfloat16

    def __call__(self, batch: Tensor) -> Tensor:
        """Orthogonalise a batch (count, m, n), m <= n."""
        return torch.stack([newton_schulz_reference(matrix, self.coefficients) for matrix in batch])
