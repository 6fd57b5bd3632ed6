"""Puts the attention kernel of `gda_attention` into a model, and says whether it is there.

The layers then run it where their configuration's `attn_implementation` is "gda_kernel" (wherever it can) or
"gda_fastest" (where it was measured to be the fastest). Nothing else of the model changes.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .functions import layers_with, load_functions, namespace_in_use

REPOSITORY = "motif2/gda-attention"
ATTENTIONS = ("gda_fastest", "gda_kernel")


class KernelFunctions(NamedTuple):
    """What a layer's attribute `kernel` holds.

    Args:
        attend: `gda_attention` of the kernel's package.
        decode: its `gda_decode`.
        supports: whether it takes heads of a size and type on a device.
        supports_flash: whether FlashAttention-4's kernels could do its passes.
        namespace: of its operators.
    """

    attend: Callable
    decode: Callable
    supports: Callable
    supports_flash: Callable
    namespace: str


def _layers(model: nn.Module) -> list[nn.Module]:
    return layers_with(model, ("lambda_value", "kernel"), "grouped differential attention")


def use_gda_attention(
    model: nn.Module,
    source: str = "auto",
    *,
    attn_implementation: str = "gda_fastest",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Puts the attention kernel into every layer of `model`, and sets the model's `attn_implementation`.

    Args:
        model: a Motif-2 model, or one that wraps it.
        source: "local" (this checkout), "hub", "auto" (the first of these that can be had), or "torch" to take the
            kernel out and go back to "sdpa".
        attn_implementation: "gda_fastest" to measure and choose, "gda_kernel" to take the kernel wherever it can run.
        revision: commit, tag or branch on the Hub; version 1 if None.
        trust_remote_code: load from a publisher whom the Hub does not list as trusted.

    Returns:
        str: namespace of the kernel's operators, empty where there is none: the layers then choose among libraries.

    Raises:
        ValueError: unknown source or attention, or a model without this attention.
        KernelUnavailable: the source that was asked for cannot be had.
    """
    if attn_implementation not in ATTENTIONS:
        raise ValueError(f"attn_implementation is {attn_implementation!r}: choose one of {', '.join(ATTENTIONS)}")
    layers = _layers(model)
    names = ("gda_attention", "gda_decode", "supports", "supports_flash", "__name__")
    without = "attention chooses among libraries, without a kernel"
    found = load_functions("gda_attention", REPOSITORY, names, source, revision, trust_remote_code, without)
    functions = KernelFunctions(*found) if found else None
    for layer in layers:
        layer.kernel = functions
        layer.config._attn_implementation = "sdpa" if source == "torch" else attn_implementation
    return functions.namespace if functions else ""


def gda_attention_in_use(model: nn.Module) -> str:
    """Returns the namespace of the kernel that the model's layers hold, empty for none.

    Raises:
        ValueError: the layers differ, or the model has none.
    """
    return namespace_in_use(_layers(model), "kernel")
