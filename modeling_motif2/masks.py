"""Attention masks: a query sees a key that order (causal, or a window), padding and document borders all let it see.

transformers' mask functions forget the borders of packed documents where there is also a padding mask or a cache; here
documents are told first, from every source at once, and then joined with the rest in the backend's own form.

Shapes: B batch, T query tokens, S key tokens.
"""

import copy
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    flash_attention_mask,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils.import_utils import is_tracing

from .configuration_motif2 import Motif2Config
from .visible_intervals import boolean_mask, is_intervals, lengths_between

BUILDERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class CacheWithFixedOffset:
    """A cache whose query offset stays put while the layers advance it.

    A static cache counts its tokens in a tensor, which FlexAttention's mask would read only after that was advanced.
    """

    def __init__(self, cache: Cache):
        self._cache = cache

    def get_query_offset(self, layer_idx: int = 0) -> int | torch.Tensor:
        offset = self._cache.get_query_offset(layer_idx)
        return offset.clone() if isinstance(offset, torch.Tensor) else offset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def for_tokens(config: Motif2Config, tokens: int) -> Motif2Config:
    """Returns the configuration that names the backend for so many tokens: FlexAttention leaves one token to SDPA.

    On a GPU it is compiled anew for every length of a growing cache.
    """
    if tokens == 1 and config._attn_implementation == "flex_attention":
        config = copy.copy(config)
        config._attn_implementation = "sdpa"
    return config


def takes_lengths(config: Motif2Config) -> bool:
    """Whether the backend is a flash attention: it takes documents by their lengths, and no mask but padding."""
    return ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(config._attn_implementation) is flash_attention_mask


def positions_from_cumulative_lengths(cumulative_lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns position_ids (1, T) that restart at every document of a packed row; lengths are (documents + 1,)."""
    index = torch.arange(tokens, device=cumulative_lengths.device)
    document = torch.searchsorted(cumulative_lengths, index, right=True) - 1
    return (index - cumulative_lengths[document])[None]


def document_index(
    config: Motif2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Tells the packed documents of a batch: their borders are those of the positions and of `cu_seq_lens_q` together.

    A document begins where a token's position follows the one before it neither by one nor by the distance that
    padding puts between them. Padding belongs to the document before it. While a graph is traced, nothing can be asked
    of the device: positions then always count as packed, except beside a cache; flash attention is left to itself.

    Args:
        config: names the backend.
        inputs_embeds: (B, T, C).
        attention_mask: (B, S) padding; in a prepared mask documents are the caller's affair.
        past_key_values: the caller's cache, or None.
        position_ids: (B or 1, T) of the caller, or None.
        kwargs: of the forward, for `cu_seq_lens_q` (documents + 1,) and `cu_seq_lens_k`.

    Returns:
        (B, T) int64, a number that is the same within a document; None where every row is one document.

    Raises:
        ValueError: if lengths do not fit the row, or documents come after cached tokens.
    """
    lengths = kwargs.get("cu_seq_lens_q")
    two_dimensional = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping or not two_dimensional:
        return None  # an engine with a cache of its own, or a prepared mask
    batch, tokens, device = *inputs_embeds.shape[:2], inputs_embeds.device
    if lengths is None and kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError("cu_seq_lens_k is given without cu_seq_lens_q: give both, or cu_seq_lens_q alone.")
    tracing = is_tracing(inputs_embeds)
    if tracing and (takes_lengths(config) or (lengths is None and past_key_values is not None)):
        return None
    if tokens == 1 or (lengths is None and position_ids is None):
        return None
    cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    starts = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    if lengths is not None:
        if not tracing:
            _check_lengths(lengths, kwargs.get("cu_seq_lens_k"), batch, tokens, cached)
        index = torch.arange(tokens, device=device)
        document = torch.searchsorted(lengths.to(device, torch.int64), index, right=True)  # (T,)
        starts[:, 1:] |= document.diff() != 0
    if position_ids is not None:
        is_token = None
        if attention_mask is not None and attention_mask.shape[1] >= cached + tokens:
            is_token = attention_mask[:, cached : cached + tokens].to(device, torch.bool)
        starts[:, 1:] |= _breaks(position_ids.to(device).expand(batch, -1), is_token)
    if not tracing and not starts.any():
        return None
    if cached:
        raise ValueError(
            f"position_ids do not go on by one from token to token while the cache holds {cached} tokens: packed "
            "documents cannot continue a cache, so give each document its own row, or no past_key_values."
        )
    return starts.cumsum(1)


def _check_lengths(lengths: torch.Tensor, of_keys: torch.Tensor | None, batch: int, tokens: int, cached: int) -> None:
    ends = lengths.tolist()
    if batch != 1 or not ends or ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
        raise ValueError(
            f"cu_seq_lens_q={ends} does not divide one row of {tokens} tokens ({batch} rows are given): flatten the "
            f"batch to one row, and give the documents' borders from 0 to its length."
        )
    if of_keys is not None and of_keys is not lengths and of_keys.tolist() != ends:
        raise ValueError(f"cu_seq_lens_k={of_keys.tolist()} differs from cu_seq_lens_q={ends}: give the same.")
    if cached:
        raise ValueError(f"cu_seq_lens_q cannot continue a cache of {cached} tokens: give no past_key_values.")


def _breaks(position_ids: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """Returns (B, T - 1), where tokens after the first begin a document; `is_token` (B, T) is False on padding."""
    if is_token is None:
        return position_ids.diff(dim=1) != 1
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    before = torch.where(is_token, index, -1).cummax(1).values[:, :-1]  # (B, T - 1), the token before each, or -1
    step = position_ids[:, 1:] - position_ids.gather(1, before.clamp(min=0))
    follows = (step == 1) | (step == index[1:] - before)
    return is_token[:, 1:] & (before >= 0) & ~follows


def attention_masks(
    config: Motif2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    documents: torch.Tensor | None,
) -> dict[str, Any]:
    """Makes one mask for each type of layer, in the form of the backend that `config` names.

    Args:
        config: names the backend, and the types of layers.
        inputs_embeds: (B, T, C).
        attention_mask: (B, S) padding; (B or 1, 1, T, S) or a dictionary by type of layer, used as they are; or None.
        past_key_values: the caller's cache, or None.
        documents: (B, T) from `document_index`, or None.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    config = for_tokens(config, inputs_embeds.shape[1])
    types = dict.fromkeys(config.layer_types)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        return dict.fromkeys(types, _in_form_of_backend(config, attention_mask, inputs_embeds))
    if takes_lengths(config):
        if documents is not None:
            return types  # no mask: lengths say it all
        if attention_mask is None and getattr(past_key_values, "is_compileable", False):
            # The cache is longer than what it holds, and only a mask says by how much.
            held = int(past_key_values.get_seq_length()) + inputs_embeds.shape[1]
            attention_mask = torch.ones(len(inputs_embeds), held, dtype=torch.bool, device=inputs_embeds.device)
    if documents is not None:
        arguments = (inputs_embeds, attention_mask, past_key_values, documents)
        return {layer_type: _packed(config, layer_type, *arguments) for layer_type in types}
    if past_key_values is not None and config._attn_implementation == "flex_attention":
        past_key_values = CacheWithFixedOffset(past_key_values)
    arguments = (config, inputs_embeds, attention_mask, past_key_values)
    return {layer_type: BUILDERS[layer_type](*arguments) for layer_type in types}


def _in_form_of_backend(config: Motif2Config, mask: torch.Tensor, inputs_embeds: torch.Tensor) -> Any:
    """Turns a mask of the caller's (B or 1, 1, T, S), boolean or added to the logits, into what the backend takes."""
    batch, dtype, name = inputs_embeds.shape[0], inputs_embeds.dtype, config._attn_implementation
    if name == "flex_attention":
        mask = mask.expand(batch, -1, -1, -1)
    if mask.is_floating_point():
        return mask
    mask = mask.bool()
    if name == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    if name == "flex_attention":

        def is_visible(row, head, query, key):
            return mask[row, 0, query, key]

        return create_block_mask(is_visible, batch, None, *mask.shape[2:], device=mask.device)
    return mask


def _packed(
    config: Motif2Config,
    layer_type: str,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: torch.Tensor,
) -> Any:
    """Returns the mask of packed documents, beside padding and an empty cache of any kind."""
    tokens, keys, offset, window = documents.shape[1], documents.shape[1], 0, None
    if past_key_values is not None:
        keys, offset = past_key_values.get_mask_sizes(tokens, config.layer_types.index(layer_type))
    order = causal_mask_function
    if layer_type == "sliding_attention":
        window = config.sliding_window
        order = sliding_window_causal_mask_function(window)
    if attention_mask is not None:
        attention_mask = attention_mask.to(inputs_embeds.device, torch.bool)
    documents = pad(documents, (0, max(0, offset + keys - tokens)), value=-1)  # what a static cache has room for
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=len(documents),
        q_length=tokens,
        kv_length=keys,
        q_offset=0,
        kv_offset=offset,
        mask_function=and_masks(order, packed_sequence_mask_function(documents)),
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        local_size=window,
        dtype=inputs_embeds.dtype,
        config=config,
        use_vmap=False,
        device=inputs_embeds.device,
    )


def packed_lengths(
    documents: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> dict[str, Any]:
    """Returns what flash attention takes for packed documents: the rows one after another, padding by itself.

    Args:
        documents: (B, T) from `document_index`.
        attention_mask: (B, T) with 0 on padding, or None.
        past_key_values: an empty cache, or None.

    Raises:
        ValueError: if lengths cannot say it: padding inside a document, or a static cache.
    """
    if getattr(past_key_values, "is_compileable", False):
        raise ValueError(
            "flash attention cannot keep packed documents apart in a static cache: use a DynamicCache, or sdpa."
        )
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents.diff(dim=1) != 0
    if attention_mask is not None:
        is_token = attention_mask.to(documents.device, torch.bool)
        resumes = is_token[:, 1:] & ~is_token[:, :-1] & is_token.cumsum(1)[:, :-1].bool() & ~starts[:, 1:]
        if resumes.any():
            raise ValueError(
                "attention_mask has padding inside a packed document, which flash attention cannot leave out: move "
                "padding to the ends of documents, or use sdpa."
            )
        starts[:, 1:] |= is_token.diff(dim=1)
    return lengths_between(starts)


def visible_positions(
    config: Motif2Config,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    documents: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Returns what each query sees by type of layer, whatever the backend; arguments as in `attention_masks`.

    Returns:
        (B or 1, 1, T, S) boolean, without the queries on padding where that is known. A type that is left out is in
        plain causal order.
    """
    given = attention_mask if isinstance(attention_mask, dict) else {}
    types = dict.fromkeys(config.layer_types)
    nothing_masked = documents is None and (attention_mask is None or set(given.values()) == {None})
    if nothing_masked and past_key_values is None and set(types) == {"full_attention"}:
        return {}
    if any(given.get(layer_type) is None for layer_type in types):
        eager = copy.copy(config)
        eager._attn_implementation = "eager"
        padding = None if given else attention_mask
        masks = attention_masks(eager, inputs_embeds, padding, past_key_values, documents) | {
            layer_type: mask for layer_type, mask in given.items() if mask is not None
        }
    else:
        masks, padding = given, None
    return {
        layer_type: _boolean(masks[layer_type], padding, inputs_embeds.shape[1], past_key_values, layer)
        for layer, layer_type in ((config.layer_types.index(layer_type), layer_type) for layer_type in types)
    }


def _boolean(mask: Any, padding: Any, tokens: int, past_key_values: Cache | None, layer: int) -> torch.Tensor:
    """Returns a mask in any form as (B or 1, 1, T, S) boolean; padding (B, S) takes its queries out."""
    if isinstance(mask, BlockMask):
        rows, _, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, rows, 1, queries, keys, device=mask.kv_num_blocks.device)
    elif is_intervals(mask):
        keys = tokens if past_key_values is None else past_key_values.get_mask_sizes(tokens, layer)[0]
        mask = boolean_mask(mask, keys)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise ValueError(
            f"attention cannot be recorded through a prepared mask of {getattr(mask, 'ndim', type(mask).__name__)} "
            "dimensions: give a (batch, tokens) mask, or use attn_implementation='sdpa' while recording."
        )
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    mask = mask.bool()
    if isinstance(padding, torch.Tensor) and padding.ndim == 2:
        mask = mask & padding[:, None, -tokens:, None].to(mask.device, torch.bool)
    return mask
