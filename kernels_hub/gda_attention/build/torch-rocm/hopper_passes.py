"""Launches of the kernels written for Hopper, forward and backward, and when they can run.

Shapes: B rows, T queries and keys, G groups, r signal heads a group, D head dimension, H = G * (r + 1) heads.
"""

import math
import warnings
from collections.abc import Callable

import torch
import triton

try:
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        raise ImportError("Gluon before Triton 3.6 has other functions")
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import hopper_forward, hopper_key, hopper_query, hopper_tiles, hopper_value

    HAS_GLUON = True
except (ImportError, AttributeError):  # no Gluon, or another one
    HAS_GLUON = False

from .passes import key_runs

LOG2_E = math.log2(math.e)
BLOCK = 128  # queries and keys of a block of dS, queries of a tile of the forward
FORWARD_RINGS = {"BLOCK_N": 64, "KEY_STAGES": 3, "VALUE_STAGES": 3}
usable = True  # until a launch fails


def suits(signal_query, noise_query, key, value) -> bool:
    """Whether the passes take these inputs: heads of 128, 16 bits, as many queries as keys, on Hopper.

    Addresses and strides must be multiples of 16 bytes, for the copy engine, and a token's heads lie within its stride
    (as projections leave them; not heads before tokens, as caches keep them).
    """
    if not HAS_GLUON or signal_query.device.type != "cuda" or torch.version.hip is not None:
        return False
    if signal_query.shape[-1] != 128 or signal_query.shape[1] != key.shape[1] or signal_query.element_size() != 2:
        return False
    if torch.cuda.get_device_capability(signal_query.device) != (9, 0):
        return False
    return value.stride(3) == value.shape[4] and all(
        each.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in each.stride()[:-1])
        and each.stride(1) >= _width(each)
        for each in (signal_query, noise_query, key, value)
    )


def attempt(work: Callable):
    """Result of `work`, whose launches are of these kernels; None where one fails, or has failed in this process.

    A compiler or driver of another version may refuse them. Memory that ran out is the caller's matter.
    """
    global usable
    if not usable:
        return None
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever they raise
        usable = False
        said = f"{type(error).__name__}: {str(error).strip()[:300]}"
        warnings.warn(f"attention's kernels in Gluon do not run here, Triton's do from now on: {said}", stacklevel=2)
        return None


def _width(tensor: torch.Tensor) -> int:
    """Elements from the first of a token of (B, T, ...) to its last."""
    places = zip(tensor.shape[2:], tensor.stride()[2:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in places)


def _describe(tensor: torch.Tensor, rows: int, columns: int) -> "TensorDescriptor":
    """Tiles (1, rows, columns) of a tensor (B, T, ...) seen as (B, T, everything else)."""
    shape, strides = [*tensor.shape[:2], _width(tensor)], [*tensor.stride()[:2], 1]
    return TensorDescriptor(tensor, shape, strides, [1, rows, columns], hopper_tiles.tile_layout.fn(rows, columns))


def forward(
    signal_query, noise_query, key, value, lambda_, weight, raw, out, lse, scaling, eps, out_scale,
    first, last, has_intervals, interval_stride,
):  # fmt: skip
    """Writes raw (B, T, H or G, 2D), out and lse like `launch.forward`; returns largest logits (B, H, 2 * tiles)."""
    batch, tokens, groups, ratio, dim = signal_query.shape
    tiles, raw_signals = triton.cdiv(tokens, BLOCK), raw.shape[2] - groups
    largest = lse.new_empty((batch, lse.shape[1], 2 * tiles))
    keys, values = _describe(key, 64, dim), _describe(value, 64, 2 * dim)
    for noise in (True, False):
        query = noise_query[:, :, :, None] if noise else signal_query
        hopper_forward.forward_kernel[(batch * groups * tiles * query.shape[3],)](
            _describe(query, 64, dim), keys, values, lambda_, weight, first, last, raw, out, lse, largest,
            *query.stride()[2:4], *key.stride()[2:4], value.stride(2), tokens, groups, batch * groups,
            interval_stride, raw_signals, scaling * LOG2_E, eps, out_scale,
            RATIO=ratio, NOISE=noise, SAVE_RAW=raw_signals > 0, HAS_INTERVALS=has_intervals, **FORWARD_RINGS,
            num_warps=hopper_tiles.WARPS, maxnreg=hopper_tiles.REGISTERS,
        )  # fmt: skip
    return largest


class Passes:
    """The backward's three passes over one set of inputs.

    Args:
        signal_query: (B, T, G, r, D).
        noise_query: (B, T, G, D).
        key: (B, T, G, 2, D).
        value: (B, T, G, 2, D).
        draw: (B, T, H, 2D), the signal heads of all groups first, then the noise heads.
        lse: (B, H, T) in base 2, heads like those of `draw`.
        delta: (B, H, T).
        dmaps: scratch of blocks of dS, (blocks * 128, 128).
        gradients: of the first four, contiguous.
        scaling: of the logits.
        intervals: first and last, whether there are any, their stride along rows.
    """

    def __init__(self, signal_query, noise_query, key, value, draw, lse, delta, dmaps, gradients, scaling, intervals):
        self.batch, self.tokens, self.groups, self.ratio = signal_query.shape[:4]
        self.signal, self.noise = _describe(signal_query, 64, 128), _describe(noise_query, 64, 128)
        self.key, self.value = _describe(key, 64, 128), _describe(value, 64, 256)
        self.draw, self.blocks_of_maps = _describe(draw, 64, 256), _describe(dmaps.view(-1, BLOCK, BLOCK), 64, BLOCK)
        self.dmaps, self.lse, self.delta, self.gradients, self.scaling = dmaps, lse, delta, gradients, scaling
        self.query_strides = (*signal_query.stride()[2:4], noise_query.stride(2))
        self.key_strides, self.value_stride = key.stride()[2:4], value.stride(2)
        self.blocks = triton.cdiv(self.tokens, BLOCK)
        self.first, self.last, has_intervals, self.interval_stride = intervals
        self.runs = key_runs(self.first, self.last, self.tokens, BLOCK) if has_intervals else lse
        self.options = {"RATIO": self.ratio, "HAS_INTERVALS": has_intervals}
        self.options |= {"num_warps": hopper_tiles.WARPS, "maxnreg": hopper_tiles.REGISTERS}

    def query(self, where) -> None:
        """dQ, and dS of a part; `where`: first group, groups, first block, blocks, base, blocks of a map."""
        hopper_query.query_kernel[(where[3] * where[1] * (self.ratio + 1),)](
            self.signal, self.noise, self.key, self.value, self.draw, self.lse, self.delta, self.first, self.last,
            self.dmaps, *self.gradients[:2], self.interval_stride, self.tokens, self.groups, *where,
            self.scaling * LOG2_E, self.scaling, *self.query_strides, *self.key_strides, self.value_stride,
            BLOCK_N=64, KEY_STAGES=4, VALUE_STAGES=2, **self.options,
        )  # fmt: skip

    def key_sum(self, where, dkey: torch.Tensor, add: bool) -> None:
        """dK of a part from its dS, into `dkey` (B, T, G, 2, D) or added to it."""
        hopper_key.key_kernel[(2 * triton.cdiv(self.blocks, 2) * where[1],)](
            self.signal, self.noise, self.blocks_of_maps, self.runs, dkey,
            self.interval_stride, self.tokens, self.groups, *where, self.scaling, *self.query_strides,
            ADD=add, STAGES=4, **self.options,
        )  # fmt: skip

    def value_sum(self) -> None:
        """dV."""
        hopper_value.value_kernel[(self.blocks * self.batch * self.groups,)](
            self.signal, self.noise, self.key, self.draw, self.lse, self.first, self.last, self.runs,
            self.gradients[3], self.interval_stride, self.tokens, self.groups, self.batch * self.groups,
            self.scaling * LOG2_E, *self.query_strides, *self.key_strides,
            BLOCK_M=64, STAGES=3, **self.options,
        )  # fmt: skip
