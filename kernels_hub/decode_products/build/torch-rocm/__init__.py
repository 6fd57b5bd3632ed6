"""One token through a layer's weights at the memory's rate: products with a norm before and a sum after, PolyNorm."""

from .ops import poly_norm_mul, product, supports

__all__ = ["poly_norm_mul", "product", "supports"]
