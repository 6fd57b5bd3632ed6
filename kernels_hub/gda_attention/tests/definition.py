"""Grouped differential attention as the paper writes it, head by head in float64, and inputs to compare on.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension.
"""

from typing import NamedTuple

import torch

OUT_SCALE, EPS = 0.7, 1e-5


class Inputs(NamedTuple):
    """Arguments of `gda_attention` that want a gradient."""

    signal_query: torch.Tensor  # (B, T, G, r, D)
    noise_query: torch.Tensor  # (B, T, G, D)
    key: torch.Tensor  # (B, S, G, 2, D)
    value: torch.Tensor  # (B, S, G, 2, D)
    lambda_: torch.Tensor  # ()
    weight: torch.Tensor  # (2D,)


def make(batch, tokens, keys, groups, ratio, dim, dtype, device, seed=0, head_first=False) -> Inputs:
    """Random inputs, contiguous as projections leave them, or with heads before tokens as caches keep them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if head_first:  # (B, T, heads …, D) out of (B, heads …, T, D)
            stored = torch.randn(shape[0], *shape[2:-1], shape[1], shape[-1], generator=generator)
            return stored.to(device, dtype).movedim(-2, 1).requires_grad_()
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    lambda_ = torch.tensor(0.4, device=device, requires_grad=True)
    weight = (1 + 0.2 * torch.randn(2 * dim, generator=generator)).to(device).requires_grad_()
    return Inputs(
        draw(batch, tokens, groups, ratio, dim),
        draw(batch, tokens, groups, dim),
        draw(batch, keys, groups, 2, dim),
        draw(batch, keys, groups, 2, dim),
        lambda_,
        weight,
    )


def causal(batch, tokens, keys, device):
    """Intervals of plain causal order, the last query seeing every key: each (B, T)."""
    last = (torch.arange(tokens, dtype=torch.int32, device=device) + keys - tokens).expand(batch, -1)
    return torch.zeros_like(last), last


def definition(inputs: Inputs, first, last):
    """out (B, T, G, r, 2D) and max_logits (G, r + 1), of intervals (B or 1, T)."""
    signal_query, noise_query, key, value, lambda_, weight = inputs
    batch, tokens, groups, ratio, dim = signal_query.shape
    index = torch.arange(key.shape[1], device=key.device)
    seen = ((index >= first[..., None]) & (index <= last[..., None])).expand(batch, tokens, -1)
    largest = torch.full((groups, ratio + 1), -torch.inf, dtype=torch.float64)

    def attend(query, keys, values, place):
        logits = (query @ keys.mT / dim**0.5).masked_fill(~seen, -torch.inf)  # (B, T, S)
        largest[place] = logits.max()
        return torch.softmax(logits.masked_fill(~seen.any(-1, keepdim=True), 0), dim=-1).where(seen, 0) @ values

    outputs = []
    for group in range(groups):
        values = torch.cat((value[:, :, group, 0], value[:, :, group, 1]), dim=-1)  # (B, S, 2D)
        noise = attend(noise_query[:, :, group], key[:, :, group, 1], values, (group, ratio))
        for head in range(ratio):
            signal = attend(signal_query[:, :, group, head], key[:, :, group, 0], values, (group, head))
            difference = signal - lambda_ * noise
            normed = difference / torch.sqrt(difference.square().mean(-1, keepdim=True) + EPS)
            outputs.append(normed * weight * OUT_SCALE)
    return torch.stack(outputs, dim=2).unflatten(2, (groups, ratio)), largest


def in_float64(inputs: Inputs) -> Inputs:
    """The same values in float64, as new leaves."""
    return Inputs(*(each.detach().double().requires_grad_() for each in inputs))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is not finite."""
    error = (actual.double() - expected).norm() / expected.norm()
    return float(error) if torch.isfinite(actual).all() else float("inf")
