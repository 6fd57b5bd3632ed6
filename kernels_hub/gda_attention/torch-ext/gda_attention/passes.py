"""Launches of the backward's passes in Triton, for whatever the kernels take.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension, H = G * (r + 1) heads.
"""

import math

import torch
import triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a Triton without descriptors
    TensorDescriptor = None

from . import backward_kernels

LOG2_E = math.log2(math.e)


def precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine takes these tensors: addresses and strides are multiples of 16 bytes."""
    return TensorDescriptor is not None and all(
        tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def _sources(wanted: bool, rows: int, *tensors: torch.Tensor):
    """Whether there are descriptors of `rows` tokens of tensors (B, T, places, heads, D), and these or the tensors."""
    if not (wanted and describable(*tensors)):
        return False, tensors
    return True, [
        TensorDescriptor(each, list(each.shape), list(each.stride()), [1, rows, 1, 1, each.shape[-1]])
        for each in tensors
    ]


def key_runs(first: torch.Tensor, last: torch.Tensor, num_keys: int, tile: int) -> torch.Tensor:
    """Which queries see any key of a tile: the first, and the one after the last; (B or 1, 2, tiles)."""
    starts = torch.arange(0, num_keys, tile, device=first.device, dtype=torch.int32).expand(first.shape[0], -1)
    ends = (starts + tile).clamp(max=num_keys) - 1
    bounds = (
        torch.searchsorted(last, starts.contiguous(), out_int32=True),
        torch.searchsorted(first, ends.contiguous(), right=True, out_int32=True),
    )
    return torch.stack(bounds, dim=1)


class Passes:
    """The three passes over one set of inputs.

    Args:
        signal_query: (B, T, G, r, D), heads' rows contiguous here and in the next three.
        noise_query: (B, T, G, D).
        key: (B, S, G, 2, D).
        value: (B, S, G, 2, D).
        draw: (B, T, H, 2D), the signal heads of all groups first, then the noise heads.
        lse: (B, H, T) in base 2.
        delta: (B, H, T).
        dmaps: scratch of blocks of dS, (blocks * M, M).
        gradients: of the first four, contiguous.
        scaling: factor on the logits.
        intervals: first and last, whether there are any, their stride along rows.
        tiles: the kernels' `Plan`.
        triangular: whether row i of the scratch keeps i + 1 blocks only.
    """

    def __init__(
        self, signal_query, noise_query, key, value, draw, lse, delta, dmaps, gradients, scaling,
        intervals, tiles, triangular,
    ):  # fmt: skip
        self.batch, self.tokens, self.groups, self.ratio, dim = signal_query.shape
        self.signal, self.noise, self.key, self.value = signal_query, noise_query, key, value
        self.draw, self.lse, self.delta, self.dmaps = draw, lse, delta, dmaps
        self.gradients, self.scaling, self.tiles = gradients, scaling, tiles
        self.first, self.last, self.has_intervals, self.interval_stride = intervals
        self.num_keys, self.edge = key.shape[1], dmaps.shape[1]
        self.strides = (*signal_query.stride()[:4], *noise_query.stride()[:3])
        self.sizes = self.tokens, self.num_keys, self.groups
        self.triangular = triangular
        self.constants = {"RATIO": self.ratio, "HAS_INTERVALS": self.has_intervals, "DIM": dim}
        self.constants |= {"PRECISION": precision(key)}

    def _runs(self, keys: int) -> torch.Tensor:
        return key_runs(self.first, self.last, self.num_keys, keys) if self.has_intervals else self.lse

    def query(self, where) -> None:
        """dQ, and dS of a part; `where`: first group, groups, first block, blocks, base, blocks of a map."""
        tile, dmaps = self.tiles.query, self.dmaps
        described, sources = _sources(tile.descriptors, tile.keys, self.key, self.value)
        if described:
            dmaps = TensorDescriptor(dmaps, list(dmaps.shape), [self.edge, 1], [self.edge, tile.keys])
        backward_kernels.query_kernel[(where[3] * where[1] * (self.ratio + 1),)](
            self.signal, self.noise, *sources, self.draw, self.lse, self.delta, self.first, self.last, dmaps,
            *self.gradients[:2], *self.strides, *self.key.stride()[:4], *self.value.stride()[:4],
            *self.sizes, self.interval_stride, *where, self.scaling * LOG2_E, self.scaling,
            TRIANGULAR=self.triangular, DESCRIPTORS=described, BLOCK_M=self.edge, BLOCK_N=tile.keys,
            STAGES=tile.stages, num_warps=tile.warps, **self.constants,
        )  # fmt: skip

    def key_sum(self, where, dkey: torch.Tensor, add: bool) -> None:
        """dK of a part from its dS, into `dkey` (B, S, G, 2, D) or added to it."""
        tile = self.tiles.key
        backward_kernels.key_kernel[(2 * triton.cdiv(self.num_keys, self.edge) * where[1],)](
            self.dmaps, self.signal, self.noise, self._runs(self.edge), dkey, *self.strides,
            *self.sizes, self.interval_stride, *where, self.scaling,
            TRIANGULAR=self.triangular, ADD=add, EDGE=self.edge, BLOCK_M=tile.queries, STAGES=tile.stages,
            num_warps=tile.warps, **self.constants,
        )  # fmt: skip

    def value_sum(self) -> None:
        """dV."""
        tile, rows_and_groups = self.tiles.value, self.batch * self.groups
        halves = self.draw.unflatten(-1, (2, -1))  # (B, T, H, 2, D)
        described, sources = _sources(tile.descriptors, tile.queries, self.signal, self.noise[:, :, :, None], halves)
        backward_kernels.value_kernel[(triton.cdiv(self.num_keys, tile.keys) * rows_and_groups,)](
            *sources[:2], self.key, sources[2], self.lse, self.first, self.last, self._runs(tile.keys),
            self.gradients[3], *self.strides, *self.key.stride()[:4],
            *self.sizes, rows_and_groups, self.interval_stride, self.scaling * LOG2_E,
            DESCRIPTORS=described, BLOCK_M=tile.queries, BLOCK_N=tile.keys, STAGES=tile.stages,
            num_warps=tile.warps, **self.constants,
        )  # fmt: skip
