"""Attention masks of a training batch, told from its positions on the host: the device is never waited for.

Left to itself the model asks the device whether rows are packed, at the start of every forward.

Legend: B rows, T tokens.
"""

from typing import Any

import torch

from modeling_motif2 import Motif2Config
from modeling_motif2.attention_choice import CHOOSERS
from modeling_motif2.visible_intervals import boolean_mask


def attention_masks(config: Motif2Config, position_ids: torch.Tensor, device: torch.device) -> dict[str, Any] | None:
    """What the model takes as `attention_mask` for rows of packed documents.

    Args:
        config: of the model.
        position_ids: (B, T) int64, restarting with every document.
        device: where the masks go.

    Returns:
        dict: mask of each type of layer: None for plain causal order, intervals (2, B, T) int32 for the ways of
            `attention_choice`, else (B, 1, T, T) boolean. Or None where the model must tell by itself: positions on
            the device, windows, or a backend with masks of its own.
    """
    backend, types = config._attn_implementation, set(config.layer_types)
    if position_ids.device.type != "cpu" or types != {"full_attention"} or backend not in ("sdpa", *CHOOSERS):
        return None
    tokens = position_ids.shape[1]
    last = torch.arange(tokens).expand_as(position_ids)  # (B, T)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    first = torch.where(starts, last, 0).cummax(1).values  # (B, T)
    if not first.any():
        return {"full_attention": None}
    intervals = send(torch.stack((first, last)).to(torch.int32), device)
    return {"full_attention": intervals if backend in CHOOSERS else boolean_mask(intervals, tokens)}


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device, by a copy that the host does not wait for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
