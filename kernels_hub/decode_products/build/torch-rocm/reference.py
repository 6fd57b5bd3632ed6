"""The same in plain torch, for devices without Triton.

Shapes: K features in, N features out of all weights together, F features of PolyNorm.
"""

import torch
from torch.nn.functional import linear


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def product(x, weights, norm_weight, eps, residual):
    """(…, N) like x."""
    wide = _wide(x)
    if norm_weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide.dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = torch.cat([linear(wide, weight.to(wide.dtype)) for weight in weights], dim=-1)
    return (out if residual is None else out + residual).to(x.dtype)


def poly_norm_mul(gate_and_up, weight, bias, eps):
    """(…, F) like the input, (…, 2F)."""
    gate, up = _wide(gate_and_up).chunk(2, dim=-1)
    out = bias.to(gate.dtype)
    for factor, exponent in zip(weight.to(gate.dtype).unbind(), (3, 2, 1), strict=True):
        power = gate**exponent
        out = out + factor * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + eps)
    return (out * up).to(gate_and_up.dtype)
