"""Launches of the Triton kernels.

Shapes: K features in, N features out of all weights together, F features of PolyNorm.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton

from . import triton_kernels as kernels

INTERPRETED = triton.knobs.runtime.interpret
PARTS = 32  # programs of PolyNorm (assumption: a launch's latency is longer than a part's work)
LEAST_COLUMNS = 32


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


def power_of_two_in(number: int, largest: int) -> int:
    """The largest power of two, up to `largest`, that divides `number`."""
    return math.gcd(number, largest)


def tile(num_features: int, sizes: tuple[int, ...]) -> Tile:
    """What fits K features in and weights of `sizes` rows, nearly the fastest of 13 on an H100 and an H200."""
    rows, columns = (8, 512) if num_features <= 4096 else (2, 1024)
    return Tile(power_of_two_in(math.gcd(*sizes), rows), power_of_two_in(num_features, columns), 4)


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
    chosen = chosen or tile(num_features, sizes)
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
