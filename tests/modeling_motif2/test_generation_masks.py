"""A generation's masks with the attention kernel: what is asked of the device, and when."""

import pytest
import torch
from transformers.cache_utils import StaticCache

import kernels_hub
from modeling_motif2 import visible_intervals
from tests.modeling_motif2.builders import random_ids, small_model

NEW_TOKENS = 4


@pytest.fixture
def asked(monkeypatch):
    """The masks of which it was asked whether they have holes."""
    masks, ask = [], visible_intervals._is_one_run

    def noted(padding):
        masks.append(padding)
        return ask(padding)

    monkeypatch.setattr(visible_intervals, "_is_one_run", noted)
    return masks


def generate(mask, kernel=True):
    model = small_model(dtype=torch.float64, ratio=3)
    if kernel:
        kernels_hub.use_gda_attention(model, attn_implementation="gda_kernel")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    with torch.compiler.set_stance("force_eager"):
        return model.generate(random_ids(2, 7), cache_implementation="static" if kernel else None, **options)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_mask_in_one_run_is_asked_for_once(asked, padding):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :padding] = 0
    assert torch.equal(generate(mask), generate(mask, kernel=False))
    assert len(asked) == 1


def test_a_mask_with_holes_is_asked_for_at_every_step(asked):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 2] = 0
    assert torch.equal(generate(mask), generate(mask, kernel=False))
    assert len(asked) == NEW_TOKENS


def test_only_a_mask_that_grew_by_the_new_token_is_believed(asked):
    model = small_model(attention="gda_kernel")
    cache = StaticCache(model.config, max_cache_len=12)
    arguments = {"config": model.config, "inputs_embeds": torch.empty(1, 1, 0), "past_key_values": cache}
    for columns, times in ((5, 1), (6, 1), (7, 1), (9, 2), (9, 3), (10, 3)):
        model.create_masks_for_generate(attention_mask=torch.ones(1, columns), **arguments)
        assert len(asked) == times
