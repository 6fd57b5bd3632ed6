"""Puts the products of `decode_products` into a model, and says whether they are there.

A layer then multiplies a single token, as decoding at batch 1 has it, with kernels that read the weights at the
memory's rate and take norms and sums along. All else of the model stays as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .functions import layers_with, load_functions, namespace_in_use

REPOSITORY = "motif2/decode-products"


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
    return layers_with(model, ("products", "self_attn"), "layers that take products")


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
    layers = _layers(model)
    names = ("product", "poly_norm_mul", "supports", "__name__")
    without = "one token is multiplied by the model's own code"
    found = load_functions("decode_products", REPOSITORY, names, source, revision, trust_remote_code, without)
    functions = ProductFunctions(*found) if found else None
    for layer in layers:
        layer.products = functions
    return functions.namespace if functions else ""


def decode_products_in_use(model: nn.Module) -> str:
    """Returns the namespace of the products that the model's layers hold, empty for none.

    Raises:
        ValueError: the layers differ, or the model has none.
    """
    return namespace_in_use(_layers(model), "products")
