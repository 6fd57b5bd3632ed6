"""Masks told from positions on the host give what the model would tell by itself."""

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from kernels_hub import use_gda_attention
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from modeling_motif2.diagnostics import track_max_logits
from modeling_motif2.visible_intervals import boolean_mask
from trainer.masks import attention_masks

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 4,
    "num_noise_heads": 2,
    "head_dim": 8,
}
WHOLE = torch.arange(16).expand(2, -1)
PACKED = torch.cat([torch.arange(10), torch.arange(6)]).expand(2, -1)


def run(model, positions, masks):
    """Logits and maximum logits of a forward."""
    track_max_logits(model, False)
    track_max_logits(model)
    ids = torch.randint(0, 48, positions.shape, generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False).logits
    return logits, torch.stack([layer.self_attn.max_logits for layer in model.model.layers])


@pytest.mark.parametrize("positions", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "gda_kernel", "gda_fastest"])
def test_the_model_computes_the_same_with_masks_of_the_host(backend, positions):
    torch.manual_seed(0)
    model = Motif2ForCausalLM(Motif2Config(**SIZES))
    if backend != "sdpa":
        use_gda_attention(model, attn_implementation=backend)
    masks = attention_masks(model.config, positions, CPU)
    for found, wanted in zip(run(model, positions, masks), run(model, positions, None), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_packed_rows_see_their_own_document_alone():
    config = Motif2Config(**SIZES, attn_implementation="sdpa")
    found = attention_masks(config, PACKED, CPU)["full_attention"]
    embeddings = torch.zeros(2, 16, 32)
    wanted = create_causal_mask(
        config=config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None, position_ids=PACKED
    )
    assert torch.equal(found, wanted.expand_as(found))
    config._attn_implementation = "gda_kernel"
    intervals = attention_masks(config, PACKED, CPU)["full_attention"]
    assert intervals.dtype == torch.int32
    assert torch.equal(boolean_mask(intervals, 16), found)
    assert attention_masks(config, WHOLE, CPU) == {"full_attention": None}


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_other_backends_make_their_own_masks(backend):
    assert attention_masks(Motif2Config(**SIZES, attn_implementation=backend), PACKED, CPU) is None


def test_windows_are_left_to_the_model():
    config = Motif2Config(**SIZES, attn_implementation="sdpa")
    config.layer_types = ["full_attention", "sliding_attention"]
    assert attention_masks(config, PACKED, CPU) is None
