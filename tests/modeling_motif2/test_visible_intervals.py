"""Masks as intervals say what transformers' boolean masks say."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from modeling_motif2.visible_intervals import boolean_mask, causal_block_mask, is_intervals, visible_intervals

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3], [0] * 6 + [1] * 4])
FUNCTIONS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(3),
    "packed": and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)),
    "packed window": and_masks(sliding_window_causal_mask_function(2), packed_sequence_mask_function(DOCUMENTS)),
}


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
@pytest.mark.parametrize(("tokens", "keys", "offset"), [(10, 10, 0), (3, 10, 7), (1, 10, 9), (4, 10, 2), (1, 10, 0)])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_intervals_are_the_boolean_mask(kind, tokens, keys, offset, padding):
    attention_mask = None
    if padding != "none":
        attention_mask = torch.ones(2, keys, dtype=torch.bool)
        attention_mask[1, :3] = padding == "right"
        attention_mask[1, 8:] = padding == "left"
    arguments = {"batch_size": 2, "q_length": tokens, "kv_length": keys, "q_offset": torch.tensor(offset)}
    arguments |= {"mask_function": FUNCTIONS[kind], "attention_mask": attention_mask}
    intervals = visible_intervals(**arguments)
    assert is_intervals(intervals)
    assert (intervals.diff(dim=2) >= 0).all(), "bounds must not decrease along a row"
    found = boolean_mask(intervals, keys)
    wanted = sdpa_mask(**arguments, allow_is_causal_skip=False)
    queries = torch.arange(tokens) + offset
    is_token = torch.ones(2, tokens, dtype=torch.bool) if attention_mask is None else attention_mask[:, queries]
    assert torch.equal(found[is_token.nonzero()[:, 0], 0, is_token.nonzero()[:, 1]], wanted[:, 0][is_token])
    assert found.any(-1).all(), "a query that sees nothing is NaN to some kernels"
    first, last = intervals
    assert torch.equal(first <= last, is_token)


@pytest.mark.parametrize(
    ("tokens", "keys", "offset", "is_plain"), [(6, 6, 0, True), (1, 6, 5, True), (1, 6, 2, False), (2, 6, 4, False)]
)
def test_plain_causal_order_needs_no_mask(tokens, keys, offset, is_plain):
    for padding in (None, torch.ones(2, keys, dtype=torch.bool)):
        mask = visible_intervals(2, tokens, keys, offset, attention_mask=padding)
        assert (mask is None) == is_plain
    assert visible_intervals(2, tokens, keys, offset, allow_is_causal_skip=False) is not None


def test_what_is_no_interval_stays_a_boolean_mask():
    holes = torch.tensor([[True, False, True, True]])
    same_parity = {"mask_function": lambda *index: index[2] % 2 == index[3] % 2, "allow_is_causal_skip": False}
    for options in ({"attention_mask": holes}, {"use_vmap": True} | same_parity):
        mask = visible_intervals(1, 4, 4, **options)
        assert mask.shape == (1, 1, 4, 4)
        assert mask.dtype == torch.bool


def test_a_block_mask_made_in_inference_serves_training():
    with torch.inference_mode():
        mask = causal_block_mask(7, 9, torch.device("cpu"))
    assert not mask.kv_indices.is_inference()
    assert causal_block_mask(7, 9, torch.device("cpu")) is mask


def test_a_window_of_a_sliding_cache():
    """Keys 4 to 9 are kept; queries are 8 and 9."""
    mask = visible_intervals(1, 2, 6, 8, 4, sliding_window_causal_mask_function(3))
    assert mask.tolist() == [[[2, 3]], [[4, 5]]]
    assert visible_intervals(1, 1, 6, 9, 4) is None
    assert visible_intervals(1, 1, 6, 5, 4).tolist() == [[[0]], [[1]]]
