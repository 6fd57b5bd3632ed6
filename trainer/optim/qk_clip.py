"""QK-clip on sharded weights, for all layers at once and without asking the device for a number.

Legend: L layers of one geometry, H query heads, K key heads, D head_dim.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.optim.base import check_gate
from trainer.optim.fused import scale_rows
from trainer.optim.layout import Block, local_of
from trainer.optim.muon_clip_reference import clip_scales


class QKClip:
    """QK-clip of a model's attention modules.

    Args:
        attentions: modules with `max_logits`, head_dim and num_signal_heads_per_group.
        queries: their q_proj weights (H * D, B), as the optimizer holds them.
        keys: their k_proj weights (K * D, B).
        blocks: for each weight (by id), the block of it that this rank holds.
        threshold: largest logit left alone.
        rule: see `clip_scales`.
    """

    def __init__(
        self,
        attentions: Sequence[nn.Module],
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        blocks: dict[int, Block],
        threshold: float,
        rule: str,
    ):
        self.attentions, self.queries, self.keys, self.blocks = attentions, queries, keys, blocks
        self.threshold, self.rule = threshold, rule
        self.num_heads = [query.shape[0] // a.head_dim for a, query in zip(attentions, queries, strict=True)]

    def pack(self, device: torch.device) -> Tensor:
        """This rank's maximum logits, all layers end to end (sum of H,), -inf for heads it has not seen.

        Raises:
            ValueError: maxima above the threshold may be mere bounds.
        """
        parts = [torch.empty(0, device=device)]
        for attention, query, num_heads in zip(self.attentions, self.queries, self.num_heads, strict=True):
            check_gate(attention, self.threshold)
            logits = attention.max_logits
            if logits is None or logits.is_meta:  # a model made on the meta device records from the second step on
                parts.append(torch.full((num_heads,), -math.inf, device=device))
                continue
            logits = logits.to(device)
            if logits.numel() == num_heads:
                parts.append(logits)
            else:
                first = _first_local_head(query, logits.numel(), num_heads)
                padding = (first, num_heads - first - logits.numel())
                parts.append(nn.functional.pad(logits, padding, value=-math.inf))
        packed = torch.cat(parts).float()
        return packed.masked_fill(packed.isnan(), -math.inf)

    def apply(self, packed: Tensor, clipped: Sequence[bool]) -> None:
        """Scale the rows of heads above the threshold.

        Args:
            packed: maxima as `pack` returns them, the largest over all ranks.
            clipped: the layers to do it in.
        """
        logits = packed.split(self.num_heads)
        chosen = [layer for layer, wanted in enumerate(clipped) if wanted]
        for geometry in sorted(set(map(self._geometry, chosen))):
            layers = [layer for layer in chosen if self._geometry(layer) == geometry]
            _, num_signal_heads, head_dim = geometry
            stacked = torch.stack([logits[layer] for layer in layers])  # (L, H)
            stacked = stacked.to(torch.promote_types(torch.float32, self.queries[layers[0]].dtype))
            scales = clip_scales(stacked, num_signal_heads, self.threshold, self.rule)  # (L, H), (L, K)
            for weights, scale in zip((self.queries, self.keys), scales, strict=True):
                rows = scale.repeat_interleave(head_dim, dim=-1)  # (L, H * D) or (L, K * D)
                for layer, row_scale in zip(layers, rows, strict=True):
                    _scale_rows(local_of(weights[layer]), self.blocks[id(weights[layer])], row_scale)

    def reset(self) -> None:
        """Forget the maxima, so that the next forward pass starts anew."""
        for attention, query in zip(self.attentions, self.queries, strict=True):
            if attention.max_logits is not None:  # made before the model moved, it may lie on another device
                attention.max_logits = torch.full_like(attention.max_logits, -math.inf, device=query.device)

    def _geometry(self, layer: int) -> tuple[int, int, int]:
        attention = self.attentions[layer]
        return self.num_heads[layer], attention.num_signal_heads_per_group, attention.head_dim


def _scale_rows(local: Tensor, block: Block, row_scale: Tensor) -> None:
    """Multiply the rows of a local shard by their factors of the full matrix's `row_scale` (A,)."""
    row = 0
    for start, stop in block.row_runs:
        scale_rows(local[row : row + stop - start], row_scale[start:stop])
        row += stop - start


def _first_local_head(query: Tensor, local_heads: int, num_heads: int) -> int:
    """First of the heads that this rank computes under tensor parallelism.

    Raises:
        ValueError: the weight is not split over heads in such parts.
    """
    if isinstance(query, DTensor):
        mesh = query.device_mesh
        for axis in reversed(range(mesh.ndim)):  # tensor parallelism is the innermost axis
            placement = query.placements[axis]
            if getattr(placement, "dim", None) == 0 and mesh.size(axis) * local_heads == num_heads:
                return mesh.get_local_rank(axis) * local_heads
    raise ValueError(
        f"an attention module recorded maximum logits of {local_heads} heads, but its q_proj has {num_heads} and is "
        "not split over a mesh axis accordingly: record one maximum for each head the module computes"
    )
