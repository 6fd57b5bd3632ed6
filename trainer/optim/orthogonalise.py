"""Newton-Schulz as the parallel optimizer calls it: which kernels, in which dtype."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import kernels_hub

_KERNELS = Path(kernels_hub.__file__).parent / "newton_schulz" / "torch-ext" / "newton_schulz"


class Orthogonaliser:
    """Newton-Schulz with settings checked once.

    Args:
        method: "gram" or "classic".
        coefficients: "motif", "polar_express", "jordan", or (a, b, c) of each step.
        backend: of the kernels: "auto", "triton", "torch" or "quack".

    Raises:
        ValueError: an unknown method, backend or name, or coefficients that are no triples.
    """

    def __init__(self, method: str, coefficients: str | tuple, backend: str):
        self.kernels = _load_kernels()
        self.method, self.coefficients, self.backend = method, coefficients, backend
        if backend not in ("auto", "triton", "torch", "quack"):
            raise ValueError(f"backend is {backend!r}: choose 'auto', 'triton', 'torch' or 'quack'")
        self.kernels.newton_schulz(torch.zeros(1, 1), method, coefficients, backend="torch")  # refuses bad settings

    def cost(self, rows: int, columns: int) -> int:
        """Floating-point operations for one matrix."""
        return self.kernels.newton_schulz_flops(rows, columns, self.method)

    def result_dtype(self, wire_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype of updates, which is also what travels back: the one the kernels compute in."""
        if device.type == "cpu" or wire_dtype == torch.float64:
            return wire_dtype
        return torch.float16 if self.method == "gram" else torch.bfloat16

    def __call__(self, batch: Tensor) -> Tensor:
        """Orthogonalise a contiguous batch (count, A, B); the result takes the batch's memory where it fits."""
        dtype = self.result_dtype(batch.dtype, batch.device)
        fits = dtype.itemsize == batch.dtype.itemsize
        out = batch.view(dtype) if fits else torch.empty_like(batch, dtype=dtype)  # (count, A, B)
        return self.kernels.newton_schulz(batch, self.method, self.coefficients, backend=self.backend, out=out)


def _load_kernels() -> ModuleType:
    """Import the kernel repository's package from its folder, once."""
    name = "newton_schulz"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _KERNELS / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
