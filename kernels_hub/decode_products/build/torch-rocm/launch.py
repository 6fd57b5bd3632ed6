"""Launches of the Triton kernels.

Shapes: K features in, N features out of all weights together, F features of PolyNorm.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton

from . import triton_kernels as kernels

INTERPRETED = triton.knobs.runtime.interpret
PARTS = 32  # programs of PolyNorm (assumption: a launch's latency is longer than a part's work)
LEAST_COLUMNS = 32
MEASURED_BYTES = 2**24  # weights of fewer bytes take the first tile, unmeasured (assumption)


class Tile(NamedTuple):
    """What a program of the product does.

    Args:
        rows: rows of the weights.
        columns: columns a step.
        warps: warps.
    """

    rows: int
    columns: int
    warps: int


CANDIDATES = (Tile(8, 512, 4), Tile(4, 1024, 4), Tile(16, 512, 8), Tile(4, 2048, 8), Tile(8, 1024, 8))
_chosen: dict[tuple, Tile] = {}


def power_of_two_in(number: int, largest: int) -> int:
    """The largest power of two, up to `largest`, that divides `number`."""
    return math.gcd(number, largest)


def tiles(num_features: int, sizes: tuple[int, ...]) -> list[Tile]:
    """What fits K features in and weights of `sizes` rows, of the candidates; cut down to fit where none does."""
    common = math.gcd(*sizes)
    fitting = [each for each in CANDIDATES if common % each.rows == 0 and num_features % each.columns == 0]
    rows, columns, warps = CANDIDATES[0]
    return fitting or [Tile(power_of_two_in(common, rows), power_of_two_in(num_features, columns), warps)]


def _fastest(key: tuple, candidates: list[Tile], run: Callable[[Tile], object]) -> Tile:
    """The candidate that runs fastest here, measured once a process; the first while a CUDA graph is captured."""
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = [
            triton.testing.do_bench(lambda each=each: run(each), warmup=2, rep=10, return_mode="median")
            for each in candidates
        ]
        _chosen[key] = candidates[times.index(min(times))]
    return _chosen[key]


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether kernels may start before the one before them ends."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _options(device: torch.device) -> dict:
    early = _starts_early(device)
    return {"EARLY": early} | ({"launch_pdl": True} if early else {})


def product(x, weights, norm_weight, eps, residual, chosen=None):
    """(…, N) like x."""
    sizes = tuple(weight.shape[0] for weight in weights)
    num_features = x.shape[-1]
    if chosen is None:
        candidates = tiles(num_features, sizes)
        chosen = candidates[0]
        if len(candidates) > 1 and x.is_cuda and sum(sizes) * num_features * x.element_size() >= MEASURED_BYTES:
            key = (x.device, x.dtype, sizes, num_features, norm_weight is None, residual is None)
            with torch.cuda.device_of(x):
                chosen = _fastest(key, candidates, lambda each: product(x, weights, norm_weight, eps, residual, each))
    out = x.new_empty((*x.shape[:-1], sum(sizes)))
    pointers = [*weights, *[weights[-1]] * (3 - len(weights))]
    with torch.cuda.device_of(x):
        kernels.product_kernel[(sum(sizes) // chosen.rows,)](
            x, x if norm_weight is None else norm_weight, *pointers, x if residual is None else residual, out,
            sizes[0], sum(sizes[:2]), eps,
            K=num_features, NORM=norm_weight is not None, ADD=residual is not None, ROWS=chosen.rows,
            COLUMNS=chosen.columns, num_warps=chosen.warps, **_options(x.device),
        )  # fmt: skip
    return out


def poly_norm_mul(gate_and_up, weight, bias, eps):
    """(…, F) like the input, (…, 2F)."""
    num_features = gate_and_up.shape[-1] // 2
    out = gate_and_up.new_empty((*gate_and_up.shape[:-1], num_features))
    part = triton.next_power_of_2(triton.cdiv(num_features, PARTS))
    with torch.cuda.device_of(out):
        kernels.poly_norm_mul_kernel[(triton.cdiv(num_features, part),)](
            gate_and_up, weight, bias, out, num_features, eps, BLOCK=triton.next_power_of_2(num_features), PART=part,
            num_warps=8, **_options(out.device),
        )  # fmt: skip
    return out
