"""Newton-Schulz as the parallel optimizer calls it: which kernels, in which dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels_hub import load_local


class Orthogonaliser:
    """Newton-Schulz with settings checked once.

    Args:
        method: "gram" or "classic".
        coefficients: "motif", "polar_express", "jordan", or (a, b, c) of each step.
        backend: of the kernels: "auto", "triton", "torch" or "quack".

    Raises:
        ValueError: an unknown method, backend or name, coefficients that are no triples, or a backend that cannot run
            on this machine.
    """

    def __init__(self, method: str, coefficients: str | tuple, backend: str):
        self.kernels = load_local("newton_schulz")
        self.method, self.coefficients, self.backend = method, coefficients, backend
        if backend not in ("auto", "triton", "torch", "quack"):
            raise ValueError(f"backend is {backend!r}: choose 'auto', 'triton', 'torch' or 'quack'")
        device = "cuda" if backend in ("triton", "quack") and torch.cuda.is_available() else "cpu"
        nothing = torch.empty(0, 1, 1, device=device)
        self.kernels.newton_schulz(nothing, method, coefficients, backend=backend)  # refuses bad settings
        self._num_steps = len(
            self.kernels.COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
        )

    def cost(self, rows: int, columns: int) -> int:
        """Floating-point operations for one matrix."""
        return self.kernels.newton_schulz_flops(rows, columns, self.method, self._num_steps)

    def result_dtype(self, wire_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype of updates, which is also what travels back: the one the kernels compute in."""
        if device.type == "cpu" or wire_dtype == torch.float64:
            return wire_dtype
        return torch.float16 if self.method == "gram" else torch.bfloat16

    def __call__(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Orthogonalise a batch in contiguous parts (count, A, B) of shapes that are equal up to transposition.

        Results take the parts' memory where they fit.
        """
        dtype = self.result_dtype(parts[0].dtype, parts[0].device)
        fits = dtype.itemsize == parts[0].dtype.itemsize
        outs = [part.view(dtype) if fits else torch.empty_like(part, dtype=dtype) for part in parts]
        return self.kernels.newton_schulz(parts, self.method, self.coefficients, backend=self.backend, out=outs)
