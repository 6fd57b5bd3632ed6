"""Puts the products of `decode_products` into a model, and says whether they are there.

A layer then multiplies a single token, as decoding at batch 1 has it, with kernels that read the weights at the
memory's rate and take norms and sums along. All else of the model stays as it is.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .sources import KernelUnavailable, _load_remote, load_local

REPOSITORY = "motif2/decode-products"
SOURCES = ("auto", "local", "hub", "torch")


class ProductFunctions(NamedTuple):
    """What a layer's attribute `products` holds.

    Args:
        product: `product` of the kernel's package.
        poly_norm_mul: its `poly_norm_mul`.
        supports: whether it takes weights of a size and type on a device.
        namespace: of its operators.
    """

    product: Callable
    poly_norm_mul: Callable
    supports: Callable
    namespace: str


def _layers(model: nn.Module) -> list[nn.Module]:
    found = [module for module in model.modules() if hasattr(module, "products") and hasattr(module, "self_attn")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers that take products: is it a Motif-2 model?")
    return found


def use_decode_products(
    model: nn.Module, source: str = "auto", *, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """Puts the products for one token into every layer of `model`.

    Args:
        model: a Motif-2 model, or one that wraps it.
        source: "local" (this checkout), "hub", "auto" (the first of these that can be had), or "torch" to take the
            products out.
        revision: commit, tag or branch on the Hub; version 1 if None.
        trust_remote_code: load from a publisher whom the Hub does not list as trusted.

    Returns:
        str: namespace of the kernel's operators, empty where there is none.

    Raises:
        ValueError: unknown source, or a model without such layers.
        KernelUnavailable: the source that was asked for cannot be had.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: choose one of {', '.join(SOURCES)}")
    layers = _layers(model)
    functions, refused = None, []
    for candidate in ("local", "hub") if source == "auto" else (source,) * (source != "torch"):
        try:
            if candidate == "local":
                package = load_local("decode_products")
            else:
                package = _load_remote(REPOSITORY, revision, None, trust_remote_code)
        except KernelUnavailable as error:
            if source != "auto":
                raise
            refused.append(f"{candidate}: {error}")
            continue
        functions = ProductFunctions(package.product, package.poly_norm_mul, package.supports, package.__name__)
        break
    if functions is None and source == "auto":
        print(f"one token is multiplied by the model's own code: {'; '.join(refused)}", file=sys.stderr)
    for layer in layers:
        layer.products = functions
    return functions.namespace if functions is not None else ""


def decode_products_in_use(model: nn.Module) -> str:
    """Returns the namespace of the products that the model's layers hold, empty for none.

    Raises:
        ValueError: the layers differ, or the model has none.
    """
    found = {layer.products.namespace if layer.products is not None else "" for layer in _layers(model)}
    if len(found) > 1:
        raise ValueError(f"the model's layers hold different products: {sorted(found)}")
    return found.pop()
