"""Forward and backward by FlashAttention-4's kernels for Hopper, where that package is installed.

The package's kernels can hold a value wider than the key, but with D of 128 and a value of 256 the package picks tiles
that no multiprocessor holds, and its backward refuses query heads that share a key. Here the forward is asked for a
tile that fits, and the backward's class is compiled with one: 3 and 7 units of work where four of the package's own
calls spend 4 and 10. Our epilogues stand around them; that of the backward also gives what the package would prepare,
the logits' log-sum-exp in base 2 and delta, so it serves our own forward as well. Causal order only.

The forward gives no largest logits. In the backward, sums over tiles of keys (of queries' gradients) and over heads
that share a key are made in float32 by the copy engine, in no fixed order: results differ in their last bits between
two runs.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension, H heads of one launch.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

PACKAGE = "flash_attn.cute.flash_bwd_sm90"
DIM = 128  # assumption: the one size whose tile was measured
FORWARD_TILE = (128, 112)  # queries, keys
QUERIES, KEYS = 64, 96  # a tile of the backward
LOG2_E = math.log2(math.e)
WARPGROUPS = 2
# Operands whose roles are swapped, and how the warpgroups share each product, as the package's `BwdConfig` names them.
LAYOUT = {
    "Q_stage": 2, "dO_stage": 2, "PdS_stage": 1, "SdP_swapAB": False, "dKV_swapAB": True, "dQ_swapAB": False,
    "AtomLayoutMSdP": 1, "AtomLayoutNdKV": 1, "AtomLayoutMdQ": 1, "dQ_single_wg": True,
}  # fmt: skip


@cache
def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except Exception:  # whatever a package of another version raises on import, it cannot run
        return False


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return _found(PACKAGE)


def _fits(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return dim == DIM and dtype in (torch.bfloat16, torch.float16)


def available(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels can run: Hopper, half precision, D of 128, and `flash-attn-4` (4.0.0b36 was tested)."""
    return _fits(dim, dtype, device) and _installed()


@cache
def _kernel(heads_a_key: int, dim: int, dtype: torch.dtype) -> Callable:
    """The package's kernel, compiled for `heads_a_key` query heads a key.

    Args:
        heads_a_key: with more than one, the gradients of keys and values are sums in float32, laid out as registers.
        dim: D.
        dtype: of everything but statistics and sums.

    Returns:
        Callable: of query (B, T, H, D), key (B, S, Hk, D), value (B, S, Hk, 2D), dout (B, T, H, 2D), lse and delta
            (B, H, T'), dquery sums (B, H, T' D), dkey and dvalue (like key and value, or sums (B, Hk, S' D) and
            (B, Hk, S' 2D)) and the factor on the logits; T' and S' are whole tiles.
    """
    from cutlass import BFloat16, Float16, Float32, cute
    from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
    from flash_attn.cute.utils import AuxData
    from quack.compile_utils import make_fake_tensor

    number = BFloat16 if dtype == torch.bfloat16 else Float16
    kernel = FlashAttentionBackwardSm90(
        number, dim, 2 * dim, 1, True, tile_m=QUERIES, tile_n=KEYS, num_threads=(WARPGROUPS + 1) * 128, **LAYOUT
    )
    # The constructor refuses shared keys where widths differ, lest the tile of dV, staged over V and K, be too
    # large: here it ends within the tile of dO, which nothing reads any more.
    kernel.qhead_per_kvhead = heads_a_key
    rows, queries, keys, heads, width, wide = (cute.sym_int() for _ in range(6))
    key_heads = cute.sym_int() if heads_a_key > 1 else heads

    def half(*shape):
        return make_fake_tensor(number, shape, divisibility=8)

    def single(*shape):
        return make_fake_tensor(Float32, shape, divisibility=4)

    whole_queries, query_sums, key_sums, value_sums = (cute.sym_int() for _ in range(4))
    keys_and_values = half(rows, keys, key_heads, width), half(rows, keys, key_heads, wide)
    # Made anew: tensors of one description must have the same strides.
    gradients = half(rows, keys, key_heads, width), half(rows, keys, key_heads, wide)
    if heads_a_key > 1:
        gradients = single(rows, key_heads, key_sums), single(rows, key_heads, value_sums)
    unused = (None,) * 9, (None,) * 2  # lengths, windows and semaphores; sparse blocks and counts of tiles
    compiled = cute.compile(
        kernel, half(rows, queries, heads, width), *keys_and_values, half(rows, queries, heads, wide),
        single(rows, heads, whole_queries), single(rows, heads, whole_queries), single(rows, heads, query_sums),
        *gradients, Float32(1.0), *unused[0], AuxData(None, None), *unused[1],
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True), options="--enable-tvm-ffi",
    )  # fmt: skip
    return lambda *arguments: compiled(*arguments, *unused[0], AuxData(None, None), *unused[1])


def _convert(sums: torch.Tensor, out: torch.Tensor, factor: float, of_queries: bool) -> None:
    """Writes `factor` times the kernel's sums (B, H, whole tiles * width) to out (B, rows, H, width)."""
    from flash_attn.cute import interface

    interface._bwd_postprocess_convert(
        sums, out, factor, None, None, 90, interface.torch2cute_dtype_map[out.dtype], out.shape[-1],
        QUERIES if of_queries else KEYS, 128 if of_queries and LAYOUT["dQ_single_wg"] else WARPGROUPS * 128,
        LAYOUT["AtomLayoutMdQ" if of_queries else "AtomLayoutNdKV"],
        LAYOUT["dQ_swapAB" if of_queries else "dKV_swapAB"],
        hdim_multiple_of=64, fake_mode=False,
    )  # fmt: skip


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its rows, strides or address do not suit the copy engine."""
    strides = [stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1]]
    fits = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and not any(strides)
    return tensor if fits else tensor.contiguous()


def _differentiate(query, key, value, draw, lse, delta, scaling: float, dquery, dkey, dvalue) -> None:
    """Writes the gradients of all heads of one kind.

    Args:
        query: (B, T, H, D).
        key: (B, S, Hk, D).
        value: (B, S, Hk, 2D).
        draw: gradient of the maps' outputs (B, T, H, 2D).
        lse: (B, H, T) in base 2, inf for a query that sees nothing.
        delta: (B, H, T).
        scaling: factor on the logits.
        dquery: like query, contiguous.
        dkey: like key, any strides that are multiples of 16 bytes.
        dvalue: like value.
    """
    (batch, tokens, heads, dim), (_, num_keys, key_heads, wide) = query.shape, value.shape
    whole_queries, whole_keys = -(-tokens // QUERIES) * QUERIES, -(-num_keys // KEYS) * KEYS
    padding = (0, whole_queries - tokens)
    lse = _aligned(nn.functional.pad(lse, padding, value=torch.inf))
    delta = _aligned(nn.functional.pad(delta, padding))
    dquery_sums = lse.new_zeros((batch, heads, whole_queries * dim))
    shared = heads > key_heads
    gradients = dkey, dvalue
    if shared:
        gradients = [lse.new_zeros((batch, key_heads, whole_keys * each)) for each in (dim, wide)]
    arguments = (_aligned(each) for each in (query, key, value, draw))
    _kernel(heads // key_heads, dim, query.dtype)(*arguments, lse, delta, dquery_sums, *gradients, scaling)
    _convert(dquery_sums, dquery, scaling, True)
    if shared:
        _convert(gradients[0], dkey, scaling, False)
        _convert(gradients[1], dvalue, 1.0, False)


def _attend(query, key, value, scaling: float, out, lse) -> None:
    """Writes attention's output (B, T, H, 2D) and the log-sum-exp (B, H, T) of all heads of one kind."""
    from flash_attn.cute.interface import _flash_attn_fwd

    _flash_attn_fwd(
        *(_aligned(each) for each in (query, key, value)),
        softmax_scale=scaling, causal=True, tile_mn=FORWARD_TILE, pack_gqa=False, out=out, lse=lse,
    )  # fmt: skip


def forward(
    finish, signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale, training
):
    """out (B, T, G, r, 2D), raw (B, T, H, 2D), lse (B, H, T) in base 2, and max_logits (G, r + 1), which are NaN.

    Args:
        finish: `launch`'s or `reference`'s.
        signal_query: and the rest as in `launch.forward`; intervals must be None, every query must see a key.

    Raises:
        ValueError: there are intervals, or more queries than keys.
    """
    _check(first, signal_query, key)
    batch, tokens, groups, ratio, dim = signal_query.shape
    signals = groups * ratio
    raw = signal_query.new_empty((batch, tokens, signals + groups, 2 * dim))
    lse = signal_query.new_empty((batch, signals + groups, tokens), dtype=torch.float32)
    largest = lse.new_full((groups, ratio + 1), torch.nan)
    if signal_query.numel() == 0:
        return signal_query.new_empty((batch, tokens, groups, ratio, 2 * dim)), raw, lse, largest
    wide_value = value.flatten(3)  # (B, S, G, 2D)
    with torch.cuda.device_of(key):
        heads = signal_query.flatten(2, 3)
        _attend(heads, key[:, :, :, 0], wide_value, scaling, raw[:, :, :signals], lse[:, :signals])
        _attend(noise_query, key[:, :, :, 1], wide_value, scaling, raw[:, :, signals:], lse[:, signals:])
        lse *= LOG2_E
        return finish(raw, lambda_, weight, eps, out_scale, groups), raw, lse, largest


def _check(first, signal_query, key) -> None:
    if first is not None:
        raise ValueError('flash takes causal order only: use forward="own" and backward="own" with first and last')
    if signal_query.shape[1] > key.shape[1]:
        raise ValueError(
            f"flash takes no query that sees no key, got {signal_query.shape[1]} queries of {key.shape[1]} keys: use "
            'forward="own" and backward="own"'
        )


def backward(
    epilogue_backward, dout, signal_query, noise_query, key, value, lambda_, weight, first, last, raw, lse, scaling,
    eps, out_scale,
):  # fmt: skip
    """[dsignal_query, dnoise_query, dkey, dvalue, dlambda, dweight], contiguous, in the types of the inputs.

    Args:
        epilogue_backward: `launch`'s or `reference`'s, whose arguments it gets.
        dout: and the rest as in `launch.backward`; intervals must be None.

    Raises:
        ValueError: there are intervals, or more queries than keys.
    """
    _check(first, signal_query, key)
    groups, ratio = signal_query.shape[2:4]
    dsignal, dnoise, dkey, dvalue = gradients = [
        torch.empty(each.shape, dtype=each.dtype, device=each.device)
        for each in (signal_query, noise_query, key, value)
    ]
    if dout.numel() == 0:
        return [each.zero_() for each in (*gradients, torch.empty_like(lambda_), torch.empty_like(weight))]
    signals, wide_value = groups * ratio, value.flatten(3)  # (B, S, G, 2D)
    dvalue_of_noise = torch.empty_like(dvalue)
    with torch.cuda.device_of(key):
        draw, delta, dlambda, dweight = epilogue_backward(dout, raw, lse, lambda_, weight, eps, out_scale)
        _differentiate(
            signal_query.flatten(2, 3), key[:, :, :, 0], wide_value, draw[:, :, :signals],
            lse[:, :signals], delta[:, :signals], scaling,
            dsignal.flatten(2, 3), dkey[:, :, :, 0], dvalue.flatten(3),
        )  # fmt: skip
        _differentiate(
            noise_query, key[:, :, :, 1], wide_value, draw[:, :, signals:], lse[:, signals:], delta[:, signals:],
            scaling, dnoise, dkey[:, :, :, 1], dvalue_of_noise.flatten(3),
        )  # fmt: skip
        dvalue += dvalue_of_noise
    return [*gradients, dlambda.reshape(lambda_.shape).to(lambda_.dtype), dweight.view_as(weight).to(weight.dtype)]
