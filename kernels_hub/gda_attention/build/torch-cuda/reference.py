"""Grouped differential attention in plain torch: what runs where Triton cannot, with `launch.py`'s signatures.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension; a group's value is 2D wide.
Arithmetic is float32 (float64 for float64 inputs). It holds every logit of one group at a time.

Source: arXiv 2510.06949, section 3.
"""

import math

import torch

LOG2_E = math.log2(math.e)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def visible(first, last, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Returns which keys each query sees, (B or 1, T, S) boolean, from intervals (B or 1, T) or for causal order."""
    keys = torch.arange(num_keys, device=device)
    if first is None:
        last = torch.arange(num_queries, device=device)[None] + (num_keys - num_queries)
        first = torch.zeros_like(last)
    return (keys >= first[..., None]) & (keys <= last[..., None])


def _logits(signal_query, noise_query, key, group: int, seen, scaling: float) -> torch.Tensor:
    """Logits of one group's heads in base 2, (B, r + 1, T, S), -inf where a key is not seen; the last is the noise."""
    query = torch.cat((signal_query[:, :, group], noise_query[:, :, group, None]), dim=2)  # (B, T, r + 1, D)
    keys = key[:, :, group, [0] * signal_query.shape[3] + [1]]  # (B, S, r + 1, D)
    logits = torch.einsum("bthd,bshd->bhts", _wide(query), _wide(keys)) * (scaling * LOG2_E)
    return logits.masked_fill(~seen[:, None], -torch.inf)


def _probabilities(logits, lse) -> torch.Tensor:
    return torch.exp2(logits - lse[..., None])


def _difference(raw, lambda_, groups: int):
    """Signal outputs minus lambda times the noise's, (B, T, G, r, 2D), and the noise's (B, T, G, 1, 2D)."""
    signal, noise = _wide(raw[:, :, :-groups]).unflatten(2, (groups, -1)), _wide(raw[:, :, -groups:, None])
    return signal - _wide(lambda_) * noise, signal, noise


def finish(raw, lambda_, weight, eps, out_scale, groups):
    """out (B, T, G, r, 2D) from raw outputs (B, T, H, 2D): the epilogue alone."""
    difference, _, _ = _difference(raw, lambda_, groups)
    normed = difference * torch.rsqrt(difference.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(normed.dtype) * out_scale)).to(raw.dtype)


def forward(signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale, training):
    """out (B, T, G, r, 2D), raw (B, T, H or G, 2D), lse (B, H, T) in base 2, max_logits (G, r + 1).

    The H = G * (r + 1) heads are the signal heads of all groups, then the noise heads; without `training` raw is of
    these alone.
    """
    batch, tokens, groups, ratio, dim = signal_query.shape
    seen = visible(first, last, tokens, key.shape[1], key.device)
    wide = _wide(signal_query).dtype
    raw = signal_query.new_empty((batch, tokens, groups * (ratio + 1), 2 * dim), dtype=wide)
    lse = torch.empty((batch, groups * (ratio + 1), tokens), dtype=wide, device=key.device)
    largest = torch.empty((groups, ratio + 1), dtype=torch.float32, device=key.device)
    for group in range(groups):
        heads = _heads(group, groups, ratio)
        logits = _logits(signal_query, noise_query, key, group, seen, scaling)
        total = torch.logsumexp(logits / LOG2_E, dim=-1) * LOG2_E
        lse[:, heads] = total.masked_fill(total == -torch.inf, torch.inf)
        wide_value = _wide(value[:, :, group]).flatten(2)  # (B, S, 2D)
        raw[:, :, heads] = torch.einsum("bhts,bsv->bthv", _probabilities(logits, lse[:, heads]), wide_value)
        largest[group] = logits.amax(dim=(0, 2, 3)).float() / LOG2_E if logits.numel() else -torch.inf
    out = finish(raw, lambda_, weight, eps, out_scale, groups).to(signal_query.dtype)
    kept = raw if training else raw[:, :, -groups:]
    return out, kept.to(signal_query.dtype).contiguous(), lse, largest


def _heads(group: int, groups: int, ratio: int) -> list[int]:
    """Places of a group's heads among all: its signal heads, then its noise head."""
    return [*range(group * ratio, (group + 1) * ratio), groups * ratio + group]


def epilogue_backward(dout, raw, lse, lambda_, weight, eps, out_scale):
    """draw (B, T, H, 2D), delta (B, H, T), dlambda, dweight."""
    difference, signal, noise = _difference(raw, lambda_, dout.shape[2])
    inverse_rms = torch.rsqrt(difference.square().mean(-1, keepdim=True) + eps)
    normed = difference * inverse_rms
    dnormed = _wide(dout) * (weight.to(normed.dtype) * out_scale)
    ddifference = inverse_rms * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    dweight = (_wide(dout) * normed).sum((0, 1, 2, 3)) * out_scale
    dlambda = -(ddifference * noise).sum()
    dnoise = -_wide(lambda_) * ddifference.sum(3, keepdim=True)
    delta = torch.cat([(each * out).sum(-1).flatten(2) for each, out in ((ddifference, signal), (dnoise, noise))], 2)
    draw = torch.cat((ddifference.flatten(2, 3), dnoise.flatten(2, 3)), dim=2)
    return draw, delta.transpose(1, 2), dlambda, dweight


def backward(
    dout, signal_query, noise_query, key, value, lambda_, weight, first, last, raw, lse, scaling, eps, out_scale
):
    """[dsignal_query, dnoise_query, dkey, dvalue, dlambda, dweight], contiguous, in the types of the inputs."""
    tokens, groups, ratio = signal_query.shape[1:4]
    dim = signal_query.shape[4]
    draw, delta, dlambda, dweight = epilogue_backward(dout, raw, lse, lambda_, weight, eps, out_scale)
    seen = visible(first, last, tokens, key.shape[1], key.device)
    dsignal = torch.empty_like(signal_query, memory_format=torch.contiguous_format)
    dnoise = torch.empty_like(noise_query, memory_format=torch.contiguous_format)
    dkey = torch.empty_like(key, memory_format=torch.contiguous_format)
    dvalue = torch.empty_like(value, memory_format=torch.contiguous_format)
    for group in range(groups):
        heads = _heads(group, groups, ratio)
        logits = _logits(signal_query, noise_query, key, group, seen, scaling)
        maps = _probabilities(logits, lse[:, heads])  # (B, r + 1, T, S)
        wide_value = _wide(value[:, :, group]).flatten(2)
        dvalue[:, :, group] = torch.einsum("bhts,bthv->bsv", maps, draw[:, :, heads]).unflatten(-1, (2, dim))
        dmaps = torch.einsum("bthv,bsv->bhts", draw[:, :, heads], wide_value)
        dlogits = maps * (dmaps - delta[:, heads, :, None]) * scaling
        wide_key = _wide(key[:, :, group])
        dsignal[:, :, group] = torch.einsum("bhts,bsd->bthd", dlogits[:, :-1], wide_key[:, :, 0])
        dnoise[:, :, group] = torch.einsum("bts,bsd->btd", dlogits[:, -1], wide_key[:, :, 1])
        dkey[:, :, group, 0] = torch.einsum("bhts,bthd->bsd", dlogits[:, :-1], _wide(signal_query[:, :, group]))
        dkey[:, :, group, 1] = torch.einsum("bts,btd->bsd", dlogits[:, -1], _wide(noise_query[:, :, group]))
    return [
        dsignal, dnoise, dkey, dvalue,
        dlambda.reshape(lambda_.shape).to(lambda_.dtype), dweight.reshape(weight.shape).to(weight.dtype),
    ]  # fmt: skip


def decode(signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale):
    """out (B, 1, G, r, 2D) of one token a row."""
    arguments = (signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale)
    return forward(*arguments, False)[0]
