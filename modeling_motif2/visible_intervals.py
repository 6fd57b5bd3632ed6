"""Masks as intervals: every query sees the keys from a first to a last one. Small where a boolean mask is T x S.

Causal order, padding on either side, packed documents, windows and static caches all are such intervals, and both
bounds never decrease along a row. A padding query's interval is empty.

Shapes: B batch, T query tokens, S key tokens.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

_one_run = ContextVar("_one_run", default=False)
_lengths, _block_masks = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()  # a forward's layers share its masks


def visible_intervals(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Makes intervals in transformers' mask interface.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: S.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: whether a query sees a key, by index of row, head, query and key.
        attention_mask: (B, positions) boolean, False on padding, or None.
        allow_is_causal_skip: whether None may stand for plain causal order.
        use_vmap: whether `mask_function` may be any function of the user's.
        device: of the result.
        **kwargs: for `sdpa_mask`.

    Returns:
        (2, B, T) int32, first and last key; None for plain causal order; or transformers' boolean mask (B, 1, T, S)
        where the mask need not be intervals (a function of the user's, padding with holes) or that cannot be told
        (padding while tracing).
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    known = not torch.compiler.is_compiling() and _one_run.get()
    if use_vmap or (padding is not None and (is_tracing(padding) or not (known or _is_one_run(padding)))):
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            allow_is_causal_skip=allow_is_causal_skip, **kwargs,
        )  # fmt: skip
    if padding is not None and not known and padding.all():
        padding = None
    is_causal = mask_function is causal_mask_function
    if padding is None and is_causal and allow_is_causal_skip and isinstance(q_offset, int):
        to_the_end = q_offset + q_length == kv_length + kv_offset
        if to_the_end and (q_length == 1 or q_length == kv_length):
            return None
    queries = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, -1)  # (B, T), positions
    first = torch.full_like(queries, kv_offset)
    if not is_causal:
        first = _first_visible(mask_function, queries, first, kv_length)
    first, last = first - kv_offset, queries - kv_offset
    if padding is not None:
        start = padding.int().argmax(1, keepdim=True)  # (B, 1)
        is_token = padding.gather(1, last.clamp(max=kv_length - 1))  # (B, T)
        first = torch.where(is_token, torch.maximum(first, start), last + 1)
    return torch.stack((first, last)).to(torch.int32)


def with_growing_padding(make: Callable[[], Any], cache: Any, attention_mask: Any, tokens: int) -> Any:
    """Makes the masks of a generation's step; that padding has no holes is asked of the device at its start only.

    Asking waits for the device. Between the steps of one generation a mask only grows, by the new token.

    Args:
        make: gives the masks.
        cache: of the generation; it remembers how many columns of the mask are known to be one run a row.
        attention_mask: (B, positions), or what is no padding.
        tokens: T of this step.
    """
    two_dimensional = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    columns = attention_mask.shape[1] if two_dimensional else None
    known = tokens == 1 and two_dimensional and getattr(cache, "columns_in_one_run", None) == columns - 1
    token = _one_run.set(known)
    try:
        made = make()
    finally:
        _one_run.reset(token)
    masks = list(made.values()) if isinstance(made, dict) else [made]
    if cache is not None:
        cache.columns_in_one_run = columns if all(map(is_intervals, masks)) else None
    return made


def _is_one_run(padding: torch.Tensor) -> bool:
    """Whether every row's tokens lie next to each other; (B, S) boolean."""
    starts = padding[:, 1:] & ~padding[:, :-1]
    return bool((starts.sum(1) + padding[:, 0] <= 1).all())


def _first_visible(mask_function: Callable, queries: torch.Tensor, low: torch.Tensor, kv_length: int) -> torch.Tensor:
    """Returns each query's first visible position (B, T) by bisection: it sees itself and an interval before it."""
    rows = torch.arange(len(queries), device=queries.device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=queries.device)
    high = queries
    for _ in range(kv_length.bit_length()):
        middle = (low + high) // 2
        seen = mask_function(rows, head, queries, middle)
        low, high = torch.where(seen, low, middle + 1), torch.where(seen, middle, high)
    return high


def over_own_keys(masks: dict[str, Any], cache: Any, queries: torch.Tensor) -> dict[str, Any] | None:
    """Returns a prompt's masks over its own keys, where these are all that its cache will hold; else None.

    A static cache gives all its room, heads before tokens; the prompt's own keys lie as the projections leave them, as
    many as the queries, and suit more kernels. Their intervals are the same; plain causal order needs none. Asks the
    device, once a prompt.

    Args:
        masks: by type of layer.
        cache: of the call, or None.
        queries: (B, T, …), of the call.
    """
    if (
        cache is None
        or queries.shape[1] == 1
        or not all(is_intervals(mask) for mask in masks.values())
        or is_tracing(queries)
    ):
        return None
    if cache.get_seq_length() != 0:
        return None
    # Causal order is all that a query whose interval begins with the first key can have.
    return {layer_type: None if bool((mask[0] == 0).all()) else mask for layer_type, mask in masks.items()}


def is_intervals(mask: Any) -> bool:
    """Whether a mask is intervals (2, B, T)."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 3


def boolean_mask(intervals: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Returns intervals (2, B, T) as (B, 1, T, S) boolean; an empty one sees its last key, so that no sum is 0."""
    first, last = intervals[:, :, None, :, None]  # (B, 1, T, 1) each
    keys = torch.arange(num_keys, device=intervals.device)
    return (keys >= torch.minimum(first, last)) & (keys <= last)


def positions_of_intervals(intervals: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Returns what intervals (2, B, T) show, (B, 1, T, S) boolean; an empty one shows nothing."""
    first, last = intervals[:, :, None, :, None]  # (B, 1, T, 1) each
    keys = torch.arange(num_keys, device=intervals.device)
    return (keys >= first) & (keys <= last)


def lengths_of_documents(intervals: torch.Tensor) -> dict[str, Any]:
    """Returns what flash attention takes for documents and padding, the rows one after another; asks the device once.

    Args:
        intervals: (2, B, T) over as many keys as queries, without windows: a document's queries see from its start on.
            Padding, whose outputs are nobody's, makes documents of its own.
    """
    if intervals not in _lengths:
        first, last = intervals
        starts = first == torch.arange(first.shape[1], device=first.device)  # (B, T)
        is_padding = first > last
        starts &= ~is_padding
        starts[:, 1:] |= is_padding.diff(dim=1)
        starts[:, 0] = True
        _lengths[intervals] = lengths_between(starts)
    return _lengths[intervals]


def lengths_between(starts: torch.Tensor) -> dict[str, Any]:
    """Returns flash attention's arguments for documents that start where `starts` (B, T) says, as each row does."""
    borders = pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def block_mask(intervals: torch.Tensor, num_keys: int) -> BlockMask:
    """Returns FlexAttention's block mask of intervals (2, B, T); an empty one sees its last key."""
    if intervals not in _block_masks:
        first, last = torch.minimum(*intervals), intervals[1].clone()  # no views: they would keep the key

        def seen(batch, head, query, key):
            return (key >= first[batch, query]) & (key <= last[batch, query])

        batch, tokens = first.shape
        _block_masks[intervals] = create_block_mask(seen, batch, None, tokens, num_keys, device=str(first.device))
    return _block_masks[intervals]


@lru_cache(maxsize=8)
def causal_block_mask(tokens: int, keys: int, device: torch.device) -> BlockMask:
    """Returns FlexAttention's block mask of causal order, the last query seeing every key.

    It is kept, so it must serve training after inference.
    """
    before = keys - tokens

    def causal(batch, head, query, key):
        return key <= query + before

    with torch.inference_mode(False):
        return create_block_mask(causal, None, None, tokens, keys, device=str(device))
