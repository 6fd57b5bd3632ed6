"""The mean of several checkpoints, read a few tensors at a time and without the other ranks' help.

Source: arXiv 2508.09148 (Motif-2.6B): every 8B tokens the mean of the last 6 checkpoints is fed back. That the current
weights count as the last of the 6, and that the optimizer's state stays as it is, are assumptions.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from trainer.optim.layout import local_of

BYTES_AT_ONCE = 2**30


@torch.no_grad()
def average_with_checkpoints(model: nn.Module, checkpoints: Sequence[Path]) -> None:
    """Replace the model's weights by the mean of them and of those in `checkpoints`, each of equal weight.

    Every rank reads what it holds of each tensor; besides the model it needs about twice `BYTES_AT_ONCE`.

    Args:
        model: plain or prepared, perhaps sharded.
        checkpoints: folders of complete checkpoints of this model.
    """
    weights, seen = {}, set()
    for name, weight in get_model_state_dict(model).items():
        storage = local_of(weight).data_ptr()
        if storage not in seen or not local_of(weight).numel():  # a tied weight is averaged once
            weights[name] = weight
            seen.add(storage)
    for names in in_portions({name: local_of(weight).nbytes for name, weight in weights.items()}):
        sums = {name: weights[name].detach().clone() for name in names}
        add_checkpoints(sums, checkpoints)
        for name, total in sums.items():
            weights[name].copy_(total / (1 + len(checkpoints)))


def add_checkpoints(sums: dict[str, torch.Tensor], checkpoints: Sequence[Path]) -> None:
    """Add each checkpoint's weights to `sums`, in place.

    Args:
        sums: by the weight's name; plain tensors, or sharded ones of which only the local part is read.
        checkpoints: folders of complete checkpoints.
    """
    for path in checkpoints:
        part = {name: torch.empty_like(total) for name, total in sums.items()}
        dcp.load({"model": part}, checkpoint_id=path, no_dist=True)
        for name, total in sums.items():
            total += part[name]


def in_portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in groups of at most `BYTES_AT_ONCE`, larger ones alone.

    Args:
        sizes: bytes by name.
    """
    portion, num_bytes = [], 0
    for name, size in sizes.items():
        if portion and num_bytes + size > BYTES_AT_ONCE:
            yield portion
            portion, num_bytes = [], 0
        portion.append(name)
        num_bytes += size
    if portion:
        yield portion
