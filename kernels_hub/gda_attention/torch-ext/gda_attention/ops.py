"""Grouped differential attention as torch.library operators: seen whole by torch.compile, with their own backward.

Operators compute with Triton on a GPU (or in Triton's interpreter), else in plain torch.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension.
"""

from functools import partial

import torch

from . import flash, reference
from ._ops import add_op_namespace_prefix

try:
    from . import launch
except ImportError:  # torch for CPU comes without Triton
    launch = None

DIMS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WAYS = ("own", "flash")


def _implementation(tensor: torch.Tensor):
    if tensor.is_cuda and launch is None:
        raise RuntimeError("attention on a GPU needs Triton, which could not be imported: install triton, or use CPU")
    return launch if launch is not None and (tensor.is_cuda or launch.INTERPRETED) else reference


def _check(signal_query, noise_query, key, value, lambda_, weight, first, last) -> None:
    if signal_query.dim() != 5:
        raise ValueError(f"signal_query must be (B, T, G, r, D), got {tuple(signal_query.shape)}")
    batch, tokens, groups, ratio, dim = signal_query.shape
    num_keys = key.shape[1]
    wanted = {
        "noise_query": (noise_query, (batch, tokens, groups, dim)),
        "key": (key, (batch, num_keys, groups, 2, dim)),
        "value": (value, (batch, num_keys, groups, 2, dim)),
        "weight": (weight, (2 * dim,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for signal queries {tuple(signal_query.shape)} and {num_keys} "
                             f"keys, got {tuple(tensor.shape)}")  # fmt: skip
    if not 1 <= ratio <= 15:
        raise ValueError(f"a group has {ratio} signal heads: from 1 to 15 are supported")
    if lambda_.numel() != 1:
        raise ValueError(f"lambda_ must be one number, got {tuple(lambda_.shape)}")
    if len({each.dtype for each in (signal_query, noise_query, key, value)}) > 1:
        raise ValueError(
            f"queries, keys and values must have one type, got {signal_query.dtype}, {noise_query.dtype}, "
            f"{key.dtype} and {value.dtype}"
        )
    if _implementation(key) is launch and (dim not in DIMS or key.dtype not in DTYPES):
        raise ValueError(f"the kernel takes head dimensions {DIMS} in half or single precision, not {dim} {key.dtype}")
    _check_places(signal_query, noise_query, key, value)
    if (first is None) != (last is None):
        raise ValueError("give both first and last, or neither for causal order")
    for name, bound in (("first", first), ("last", last)):
        if bound is not None and (bound.dim() != 2 or bound.shape[0] not in (1, batch) or bound.shape[1] != tokens):
            raise ValueError(f"{name} must be ({batch} or 1, {tokens}), got {tuple(bound.shape)}")
    if first is not None and first.shape != last.shape:
        raise ValueError(f"first and last differ in shape: {tuple(first.shape)} and {tuple(last.shape)}")


def _check_places(signal_query, noise_query, key, value) -> None:
    """Within a row the kernels count elements in 32 bits."""
    tokens, groups, ratio, dim = signal_query.shape[1:]
    largest = max(
        tokens * groups * (ratio + 1) * 2 * dim,
        *(each.shape[1] * each.stride(1) for each in (signal_query, noise_query, key, value)),
    )
    if _implementation(key) is launch and largest >= 2**31:
        raise ValueError(
            f"{tokens} queries and {key.shape[1]} keys make rows of {largest} elements, the kernel counts to 2^31: "
            "give the queries in parts, each with the keys so far"
        )


def supports(dim: int, dtype: torch.dtype, ratio: int, device: torch.device) -> bool:
    """Whether the Triton kernels take such heads on `device` (outside a GPU: whether anything does)."""
    if not 1 <= ratio <= 15:
        return False
    if device.type != "cuda":
        return dtype.is_floating_point
    capable = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return launch is not None and capable and dim in DIMS and dtype in DTYPES


def supports_flash(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `gda_attention` with `forward` or `backward` of "flash" can run for such heads on `device`."""
    return flash.available(dim, dtype, device)


def _operator(name: str):
    return torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@_operator("gda_attention")
def _forward(
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lambda_: torch.Tensor,
    weight: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    scaling: float,
    eps: float,
    out_scale: float,
    training: bool,
    forward: str,
    backward: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    implementation = _implementation(key)
    function = implementation.forward
    if forward == "flash":
        function = partial(flash.forward, implementation.finish)
    with torch.autocast(key.device.type, enabled=False):
        return function(
            signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale, training
        )


@_forward.register_fake
def _(
    signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale, training, forward, _
):
    batch, tokens, groups, ratio, dim = signal_query.shape
    heads = groups * (ratio + 1)
    raw_heads = heads if training or forward == "flash" else groups
    return (
        signal_query.new_empty((batch, tokens, groups, ratio, 2 * dim)),
        signal_query.new_empty((batch, tokens, raw_heads, 2 * dim)),
        signal_query.new_empty((batch, heads, tokens), dtype=_wide(key.dtype)),
        signal_query.new_empty((groups, ratio + 1), dtype=torch.float32),
    )


@_operator("gda_attention_backward")
def _backward(
    dout: torch.Tensor,
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lambda_: torch.Tensor,
    weight: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    raw: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    eps: float,
    out_scale: float,
    backward: str,
) -> list[torch.Tensor]:
    implementation = _implementation(key)
    function = implementation.backward
    if backward == "flash":
        function = partial(flash.backward, implementation.epilogue_backward)
    with torch.autocast(key.device.type, enabled=False):
        return function(
            dout,
            signal_query,
            noise_query,
            key,
            value,
            lambda_,
            weight,
            first,
            last,
            raw,
            lse,
            scaling,
            eps,
            out_scale,
        )


@_backward.register_fake
def _(dout, signal_query, noise_query, key, value, lambda_, weight, first, last, raw, lse, *_):
    return [each.new_empty(each.shape) for each in (signal_query, noise_query, key, value, lambda_, weight)]


@_operator("gda_decode")
def _decode(
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lambda_: torch.Tensor,
    weight: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    scaling: float,
    eps: float,
    out_scale: float,
) -> torch.Tensor:
    with torch.autocast(key.device.type, enabled=False):
        return _implementation(key).decode(
            signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale
        )


@_decode.register_fake
def _(signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale):
    return signal_query.new_empty((*signal_query.shape[:-1], 2 * signal_query.shape[-1]))


def _save(ctx, inputs, output):
    *tensors, scaling, eps, out_scale, training, _, backward = inputs
    _, raw, lse, max_logits = output
    if not training:
        raise RuntimeError("the outputs that a backward needs were not kept: call gda_attention with gradients on")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(raw, lse, max_logits)
    ctx.save_for_backward(*tensors, raw, lse)
    ctx.constants = (scaling, eps, out_scale, backward)


def _differentiate(ctx, dout, *_):
    gradients = _backward(dout, *ctx.saved_tensors, *ctx.constants)
    return (*gradients, *[None] * 8)


def _refuse_double_backward(ctx, *_):
    raise NotImplementedError("attention's kernels have no double backward: use the model's own attention for it")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_double_backward)


def gda_attention(
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lambda_: torch.Tensor,
    weight: torch.Tensor,
    *,
    out_scale: float,
    eps: float = 1e-5,
    scaling: float | None = None,
    first: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    training: bool | None = None,
    forward: str = "own",
    backward: str = "own",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Grouped differential attention with its norm: `rms_norm(signal - lambda * noise) * weight * out_scale`.

    A query sees the keys `first` to `last`. Both must not decrease along a row (causal order, padding on either side,
    packed documents and windows do so); `first > last` sees nothing and gives zeros.

    Args:
        signal_query: (B, T, G, r, D) bfloat16, float16 or float32, any strides; D of 16, 32, 64 or 128.
        noise_query: (B, T, G, D).
        key: (B, S, G, 2, D), a group's signal key and its noise key.
        value: (B, S, G, 2, D), the two halves of a group's value.
        lambda_: () or (1,), weight of the noise map.
        weight: (2D,), of the norm (`subln`).
        out_scale: factor on the result, 1 - lambda_init.
        eps: added to the mean square.
        scaling: factor on the logits, D^-0.5 if None.
        first: (B or 1, T) int32, or None for causal order, the last query seeing all S keys.
        last: (B or 1, T) int32, or None.
        training: keep what a backward needs; by default whether an input wants a gradient.
        forward: "own", or "flash" for FlashAttention-4's kernel where `supports_flash`, in causal order with no more
            queries than keys; it gives no largest logits.
        backward: "own", or "flash", whatever the forward is; its results differ in their last bits between two runs.

    Returns:
        out (B, T, G, r, 2D) like the queries, contiguous, differentiable once; and max_logits (G, r + 1) float32, the
        largest scaled logit that a head's queries saw (the noise head's last), -inf where they saw none, or None.

    Raises:
        ValueError: shapes or types do not fit, or the kernel or that backward does not take them.
    """
    tensors = (signal_query, noise_query, key, value, lambda_, weight)
    _check(*tensors, first, last)
    for name, way in (("forward", forward), ("backward", backward)):
        if way not in WAYS:
            raise ValueError(f"{name} is {way!r}: choose one of {', '.join(WAYS)}")
    fits = first is None and signal_query.shape[1] <= key.shape[1]
    if "flash" in (forward, backward) and not (fits and supports_flash(key.shape[-1], key.dtype, key.device)):
        raise ValueError(
            "flash needs causal order without first and last, no more queries than keys, D of 128, half precision, a "
            f'Hopper GPU and flash-attn-4; got D {key.shape[-1]}, {key.dtype} on {key.device}: take "own"'
        )
    if training is None:
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    scaling = signal_query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _, _, max_logits = _forward(*tensors, first, last, scaling, eps, out_scale, training, forward, backward)
    return out, max_logits if forward == "own" else None


def gda_decode(
    signal_query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lambda_: torch.Tensor,
    weight: torch.Tensor,
    *,
    out_scale: float,
    eps: float = 1e-5,
    scaling: float | None = None,
    first: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same for one new token a row, without gradients: keys and values are read once, split over the keys.

    Args:
        signal_query: (B, 1, G, r, D).
        noise_query: (B, 1, G, D).
        key: (B, S, G, 2, D); with `last`, a cache of which only a part is filled.
        value: (B, S, G, 2, D).
        lambda_: () or (1,).
        weight: (2D,).
        out_scale: factor on the result.
        eps: added to the mean square.
        scaling: factor on the logits, D^-0.5 if None.
        first: (B or 1, 1) int32, or None: every key is visible.
        last: (B or 1, 1) int32, or None.

    Returns:
        torch.Tensor: (B, 1, G, r, 2D), like the queries.

    Raises:
        ValueError: as `gda_attention`, or there is more than one token.
    """
    tensors = (signal_query, noise_query, key, value, lambda_, weight)
    _check(*tensors, first, last)
    if signal_query.shape[1] != 1:
        raise ValueError(f"gda_decode takes one token a row, got {signal_query.shape[1]}: use gda_attention")
    scaling = signal_query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad():
        return _decode(*tensors, first, last, scaling, eps, out_scale)


def packed_intervals(cumulative_lengths: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `first` and `last` (1, T) int32 of a packed row whose documents start at `cumulative_lengths` (N + 1,).

    Args:
        cumulative_lengths: starts of the documents and the end of the last one, as flash attention's `cu_seqlens`.
        tokens: T; what lies behind the last document sees itself only.
    """
    index = torch.arange(tokens, device=cumulative_lengths.device, dtype=torch.int32)
    document = torch.searchsorted(cumulative_lengths, index, right=True, out_int32=True) - 1
    first = cumulative_lengths.to(torch.int32)[document]
    behind = document == len(cumulative_lengths) - 1
    return torch.where(behind, index, first)[None], index[None]
