"""Kernels for Motif-2 as Hub repositories, and the loader that puts them into a model."""

from .decode import decode_products_in_use, use_decode_products
from .gda import gda_attention_in_use, use_gda_attention
from .loader import KernelChoice, assert_polynorm_runs, polynorm_in_use, polynorm_modules, use_polynorm
from .sources import KernelUnavailable, load_layers, load_local

__all__ = [
    "KernelChoice",
    "KernelUnavailable",
    "assert_polynorm_runs",
    "decode_products_in_use",
    "gda_attention_in_use",
    "load_layers",
    "load_local",
    "polynorm_in_use",
    "polynorm_modules",
    "use_decode_products",
    "use_gda_attention",
    "use_polynorm",
]
