"""What several files of tests compare a kernel by, and inputs that they share."""

import torch

from .conftest import INTERPRETED
from .definition import EPS, OUT_SCALE, causal, definition, in_float64

# Relative error of the whole tensor. The interpreter multiplies bfloat16 wrongly: it is tested on a GPU and in torch.
LIMITS = {torch.float32: 3e-6, torch.float16: 2e-3} | ({} if INTERPRETED else {torch.bfloat16: 1.5e-2})
NAMES = ("out", "signal_query", "noise_query", "key", "value", "lambda_", "weight")
ON_GPU = torch.cuda.is_available()


def values_and_gradients(function, inputs, dout):
    out, max_logits = function(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)], max_logits


def assert_matches(kernel, inputs, first=None, last=None, limit=None):
    """Value, all gradients and the largest logits against the definition in float64."""
    device, dtype = inputs.key.device, inputs.key.dtype
    limit = LIMITS[dtype] if limit is None else limit
    batch, tokens, keys = *inputs.signal_query.shape[:2], inputs.key.shape[1]

    def ours(leaves):
        return kernel.gda_attention(*leaves, out_scale=OUT_SCALE, eps=EPS, first=first, last=last)

    bounds = causal(batch, tokens, keys, device) if first is None else (first, last)
    generator = torch.Generator().manual_seed(tokens)
    shape = (*inputs.signal_query.shape[:-1], 2 * inputs.key.shape[-1])
    dout = torch.randn(shape, generator=generator).to(device, dtype)
    got, max_logits = values_and_gradients(ours, inputs, dout)
    want, largest = values_and_gradients(lambda leaves: definition(leaves, *bounds), in_float64(inputs), dout.double())
    for name, one, other in zip(NAMES, got, want, strict=True):
        # lambda's gradient is one number left of many terms, which are those of the value's gradient; the gradients of
        # queries and keys vanish where every query sees one key.
        scale = want[NAMES.index("value")].norm()
        size = other.norm() if other.any() and name != "lambda_" else torch.maximum(other.norm(), scale)
        assert torch.isfinite(one).all(), f"{name} is not finite"
        error = float((one.double() - other).norm() / size) if size > 0 else float(one.double().norm())
        # Gradients are what is left of larger terms, the more so the fewer keys a query sees.
        assert error <= (limit if name == "out" else 4 * limit), f"{name}: relative error {error:.1e}"
    limit = max(limit, 1e-6)  # they are float32 always
    torch.testing.assert_close(max_logits.cpu().double(), largest, rtol=limit, atol=limit)


def padded(batch_lengths, width, side, device):
    """Intervals of rows with padding; a padding query sees nothing."""
    index = torch.arange(width, dtype=torch.int32, device=device)
    firsts, lasts = [], []
    for length in batch_lengths:
        start = width - length if side == "left" else 0
        valid = (index >= start) & (index < start + length)
        firsts.append(torch.where(valid, start, index + 1) if side == "right" else torch.full_like(index, start))
        lasts.append(index)
    return torch.stack(firsts).int(), torch.stack(lasts).int()


def uneven(tensor):
    """The same values in storage whose rows are one number longer: strides that no descriptor takes."""
    stored = tensor.detach().new_empty((*tensor.shape[:-1], tensor.shape[-1] + 1))
    view = stored[..., :-1]
    view.copy_(tensor.detach())
    return view.requires_grad_()
