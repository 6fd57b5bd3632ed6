"""PolyNorm in plain torch: the specification the kernels are tested against, and what runs where Triton cannot.

`y = w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`, times `up` where one is given, with `n(z) = z / sqrt(mean(z^2) + eps)` over
the last dimension. The functions have the signatures of those in `launch.py`. Arithmetic is float32 (float64 for
float64 inputs), rounded once at the end.

Source: arXiv 2411.03884 (PolyNorm); arXiv 2508.09148 (Motif-2.6B).
"""

import torch


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _powers(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x * x, x * x * x])  # (3, *x.shape)


def _coefficients(weight: torch.Tensor, inverse_rms: torch.Tensor) -> torch.Tensor:
    """Coefficients (3, *leading, 1) of x, x^2, x^3; the weights are stored with the cube's first."""
    return (_wide(weight).flip(0) * inverse_rms).movedim(-1, 0).unsqueeze(-1)


def power_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of x^2, x^4, x^6 over the last dimension: (*x.shape[:-1], 3)."""
    return _powers(_wide(x)).square().sum(-1).movedim(0, -1).contiguous()


def apply(x, up, weight, bias, inverse_rms):
    """y like x, from inverse root mean squares (*x.shape[:-1], 3) that are already known."""
    y = (_coefficients(weight, inverse_rms) * _powers(_wide(x))).sum(0) + _wide(bias)
    return (y if up is None else y * _wide(up)).to(x.dtype).contiguous()


def forward(x, up, weight, bias, eps):
    """y like x, and inverse_rms (*x.shape[:-1], 3)."""
    inverse_rms = torch.rsqrt(power_sums(x) / max(x.shape[-1], 1) + eps)
    return apply(x, up, weight, bias, inverse_rms), inverse_rms


def gradient_sums(dy, x, up, inverse_rms):
    """A row's shares of the gradients of the three weights and the bias: (*x.shape[:-1], 4)."""
    gradient = _wide(dy) if up is None else _wide(dy) * _wide(up)
    sums = (gradient * _powers(_wide(x))).sum(-1).movedim(0, -1) * inverse_rms
    return torch.cat([sums.flip(-1), gradient.sum(-1, keepdim=True)], dim=-1)


def input_gradients(dy, x, up, weight, bias, inverse_rms, sums, count):
    """[dx], and dup where there is an up, from sums (*x.shape[:-1], 4) over rows of `count` columns in all."""
    wide, dy = _wide(x), _wide(dy)
    gradient = dy if up is None else dy * _wide(up)
    coefficients = _coefficients(weight, inverse_rms)
    means = (sums[..., :3].flip(-1) * inverse_rms / count).movedim(-1, 0).unsqueeze(-1)  # (3, *leading, 1)
    slopes = torch.stack([torch.ones_like(wide), 2 * wide, 3 * wide * wide])
    dx = (coefficients * slopes * (gradient - means * _powers(wide))).sum(0).to(x.dtype).contiguous()
    if up is None:
        return [dx]
    polynomial = (coefficients * _powers(wide)).sum(0) + _wide(bias)
    return [dx, (dy * polynomial).to(up.dtype).contiguous()]


def backward(dy, x, up, weight, bias, inverse_rms):
    """[dx, dweight, dbias], and dup where there is an up."""
    sums = gradient_sums(dy, x, up, inverse_rms)
    totals = sums.reshape(-1, 4).sum(0)
    dx, *dup = input_gradients(dy, x, up, weight, bias, inverse_rms, sums, max(x.shape[-1], 1))
    dweight = totals[:3].reshape(weight.shape).to(weight.dtype, copy=True)
    dbias = totals[3:].reshape(bias.shape).to(bias.dtype, copy=True)
    return [dx, dweight, dbias, *dup]
