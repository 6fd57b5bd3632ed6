"""What gda.py and decode.py share: functions of a kernel package, found in one of its sources and put into layers."""

import sys

from torch import nn

from .sources import KernelUnavailable, load_local, load_remote

SOURCES = ("auto", "local", "hub", "torch")


def layers_with(model: nn.Module, attributes: tuple[str, ...], lacking: str) -> list[nn.Module]:
    """The modules of `model` that have all of `attributes`.

    Raises:
        ValueError: there are none; the message says what the model is lacking.
    """
    found = [module for module in model.modules() if all(hasattr(module, name) for name in attributes)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {lacking}: is it a Motif-2 model?")
    return found


def load_functions(
    name: str,
    repository: str,
    attributes: tuple[str, ...],
    source: str,
    revision: str | None,
    trust_remote_code: bool,
    without: str,
) -> tuple | None:
    """The attributes of a kernel package, from the first of the sources in question that has them all.

    Args:
        name: folder of the package in this checkout.
        repository: its name on the Hub.
        attributes: names in the package.
        source: "local" (this checkout), "hub", "auto" (the first of these that can be had), or "torch" for none.
        revision: commit, tag or branch on the Hub; version 1 if None.
        trust_remote_code: load from a publisher whom the Hub does not list as trusted.
        without: what the model does where "auto" finds none; printed with the reasons.

    Returns:
        tuple | None: the attributes, or None without a kernel.

    Raises:
        ValueError: unknown source.
        KernelUnavailable: the source that was asked for cannot be had.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: choose one of {', '.join(SOURCES)}")
    if source == "torch":
        return None
    refused = []
    for candidate in ("local", "hub") if source == "auto" else (source,):
        try:
            if candidate == "local":
                package = load_local(name)
            else:
                package = load_remote(repository, revision, None, trust_remote_code)
            lacking = [attribute for attribute in attributes if not hasattr(package, attribute)]
            if lacking:
                raise KernelUnavailable(f"{package.__name__} is too old, it has no {', '.join(lacking)}")
        except KernelUnavailable as error:
            if source != "auto":
                raise
            refused.append(f"{candidate}: {error}")
        else:
            return tuple(getattr(package, attribute) for attribute in attributes)
    print(f"{without}: {'; '.join(refused)}", file=sys.stderr)
    return None


def namespace_in_use(layers: list[nn.Module], attribute: str) -> str:
    """Namespace of the operators of the functions that all layers hold as `attribute`, empty for none.

    Raises:
        ValueError: the layers differ.
    """
    held = [getattr(layer, attribute) for layer in layers]
    found = {functions.namespace if functions is not None else "" for functions in held}
    if len(found) > 1:
        raise ValueError(f"the model's layers hold different kernels as {attribute}: {sorted(found)}")
    return found.pop()
