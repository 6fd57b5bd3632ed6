"""Puts the attention kernel of `gda_attention` into a model, and says whether it is there.

The layers then run it where their configuration's `attn_implementation` is "gda_kernel" (wherever it can) or
"gda_fastest" (where it was measured to be the fastest). Nothing else of the model changes.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .sources import KernelUnavailable, _load_remote, load_local

REPOSITORY = "motif2/gda-attention"
SOURCES = ("auto", "local", "hub", "torch")
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
    found = [module for module in model.modules() if hasattr(module, "lambda_value") and hasattr(module, "kernel")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no grouped differential attention: is it a Motif-2 model?")
    return found


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
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: choose one of {', '.join(SOURCES)}")
    if attn_implementation not in ATTENTIONS:
        raise ValueError(f"attn_implementation is {attn_implementation!r}: choose one of {', '.join(ATTENTIONS)}")
    layers = _layers(model)
    functions, refused = None, []
    for candidate in ("local", "hub") if source == "auto" else (source,) * (source != "torch"):
        try:
            if candidate == "local":
                package = load_local("gda_attention")
            else:
                package = _load_remote(REPOSITORY, revision, None, trust_remote_code)
        except KernelUnavailable as error:
            if source != "auto":
                raise
            refused.append(f"{candidate}: {error}")
            continue
        names = ("gda_attention", "gda_decode", "supports", "supports_flash", "__name__")
        lacking = [name for name in names if not hasattr(package, name)]
        if lacking:
            error = KernelUnavailable(f"{package.__name__} is too old, it has no {', '.join(lacking)}")
            if source != "auto":
                raise error
            refused.append(f"{candidate}: {error}")
            continue
        functions = KernelFunctions(*(getattr(package, name) for name in names))
        break
    if functions is None and source == "auto":
        print(f"attention chooses among libraries, without a kernel: {'; '.join(refused)}", file=sys.stderr)
    for layer in layers:
        layer.kernel = functions
        layer.config._attn_implementation = "sdpa" if source == "torch" else attn_implementation
    return functions.namespace if functions is not None else ""


def gda_attention_in_use(model: nn.Module) -> str:
    """Returns the namespace of the kernel that the model's layers hold, empty for none.

    Raises:
        ValueError: the layers differ, or the model has none.
    """
    found = {layer.kernel.namespace if layer.kernel is not None else "" for layer in _layers(model)}
    if len(found) > 1:
        raise ValueError(f"the model's layers hold different kernels: {sorted(found)}")
    return found.pop()
