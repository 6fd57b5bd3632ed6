"""PolyNorm in one pass over memory: `poly_norm`, `poly_norm_mul`, layers for `kernels`, and tensor parallelism."""

from . import layers, tensor_parallel
from .ops import poly_norm, poly_norm_mul

__all__ = ["layers", "poly_norm", "poly_norm_mul", "tensor_parallel"]
