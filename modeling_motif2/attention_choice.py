"""Attention by measurement: `attn_implementation="gda_fastest"` runs a layer in the way that was fastest here.

Ways are PyTorch's SDPA as it chooses, its FlashAttention and cuDNN kernels, cuDNN with the value in one piece of 2D,
FlexAttention, flash-attention's packages where they are installed, and the kernel of `kernels_hub/gda_attention` once
`kernels_hub.use_gda_attention` has put it into the model, with its own passes or FlashAttention-4's. A way that
fails, or disagrees with SDPA, is refused. What won is kept by device, versions, heads, size and kind of mask,
separately for training and inference, in a file of the user's cache folder. Nothing is measured outside a GPU (SDPA
runs) or while compiling (what was last measured for the same kind of mask runs, one token a row apart from more;
before that the kernel, or SDPA).
`"gda_kernel"` runs the kernel wherever it can, unmeasured.

Shapes: B batch, T query tokens, S key tokens, G groups, r signal heads a group, D head dimension.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_measurement import latest_way, measured_choice, situation_of
from .attention_ways import KERNEL, SDPA, WAYS, Way, is_recorded, is_training, possible_ways
from .diagnostics import keeps_max_logits
from .visible_intervals import visible_intervals

CHOOSERS = ("gda_fastest", "gda_kernel")


def choose(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]
) -> Way | None:
    """Returns the way for this call of a layer, measuring if this is new; None: the one the configuration names.

    Args:
        attention: the `Motif2Attention`.
        query: signal queries (B, G * r, T, D).
        key: (B, G, 2, S, D).
        mask: intervals (2, B, T), a boolean mask (B or 1, 1, T, S), or None for causal order.
        kwargs: of the attention call.
    """
    name = attention.config._attn_implementation
    if name not in CHOOSERS:
        return None
    if attention.config.single_attention_call:
        return SDPA
    kind = "causal" if mask is None else "masked"
    if mask is None and kwargs.get("cu_seq_lens_q") is not None:
        kind = "packed"
    ways = possible_ways(attention, query, key, mask, kind)
    if name == "gda_kernel" or query.device.type == "cpu" or len(ways) == 1:
        return KERNEL if name == "gda_kernel" and KERNEL in ways else SDPA
    training = is_training(query, key)
    if is_recorded(query):
        latest = latest_way(kind, training, query.shape[2] == 1)
        if latest in ways:
            return latest
        return KERNEL if KERNEL in ways else SDPA
    situation = situation_of(query, key, kind, training, keeps_max_logits(attention))
    return WAYS[measured_choice(attention, situation, ways, query, key, mask, kwargs).name]


for _name in CHOOSERS:
    # `Motif2AttentionStream` asks for the way's own backend; the name alone, elsewhere, is SDPA.
    AttentionInterface.register(_name, sdpa_attention_forward)
    AttentionMaskInterface.register(_name, visible_intervals)
