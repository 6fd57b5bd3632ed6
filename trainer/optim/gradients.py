"""What ranks tell each other about their gradients, and what follows from it.

Legend: P parameters, in the same order on every rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainer.optim.layout import local_of


def describe(parameters: Sequence[Tensor]) -> Tensor:
    """Flags (3, P), float32: this rank has a gradient placed as the parameter is; one placed otherwise; none."""
    flags = []
    for parameter in parameters:
        gradient = parameter.grad
        apart = isinstance(gradient, DTensor) and gradient.placements != parameter.placements
        flags.append((gradient is not None and not apart, apart, gradient is None))
    return torch.tensor(flags, dtype=torch.float32).T


def settle(parameters: Sequence[Tensor], names: Sequence[str], copied: Sequence[bool], flags: list) -> list[Tensor]:
    """Bring gradients to their parameters' placements where they have others (a partial sum, say).

    Args:
        parameters: all of them.
        names: of the parameters, for errors.
        copied: whether several ranks hold the same part of a parameter.
        flags: what `describe` gave, the maximum over all ranks: three lists of P.

    Returns:
        list[Tensor]: local parts of the gradients that were moved.

    Raises:
        ValueError: on all ranks, where they cannot move a gradient together, or copies would drift apart.
    """
    moved = []
    if not any(flags[1]) and not any(flags[2]):
        return moved
    for parameter, name, is_copied, fits, apart, missing in zip(parameters, names, copied, *flags, strict=True):
        if apart and (fits or missing):
            raise ValueError(
                f"the gradient of {name} has other placements than {parameter.placements} on some ranks, and is "
                "missing or lies there on others: give all ranks the same"
            )
        if missing and is_copied and (fits or apart):
            raise ValueError(
                f"only some ranks have a gradient of {name}, of which several hold a copy: average gradients over the "
                "copies first, with zeros where one has none"
            )
        if apart:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
            moved.append(local_of(parameter.grad))
    return moved


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's shard of the gradient; zeros where only other ranks have one."""
    local = local_of(parameter)
    return torch.zeros_like(local) if parameter.grad is None else local_of(parameter.grad)


def is_copied(parameter: Tensor, num_ranks: int) -> bool:
    """Whether several of the ranks hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return num_ranks > 1
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return any(isinstance(placement, Replicate) and size > 1 for placement, size in sizes)


def names_of(groups: list[dict]) -> list[str]:
    """Names of all parameters; where a group knows none, what tells them apart."""
    names = []
    for number, group in enumerate(groups):
        shapes = (tuple(parameter.shape) for parameter in group["params"])
        places = [f"parameter {index} {shape} of group {number}" for index, shape in enumerate(shapes)]
        known = group.get("names", places)
        names += known if len(known) == len(places) else places
    return names
