"""Every attention backend against the float64 reference: dtypes, masks, packing, windows, caches, compilation."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations import flash_attention
from transformers.masking_utils import sdpa_mask

from tests.modeling_motif2.builders import random_ids, small_model
from tests.modeling_motif2.reference import reference_logits

# Largest error of a logit over the largest logit, 2 layers, with lambda as it is initialised.
TOLERANCES = {torch.float64: 2e-7, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# The same in float64 where lambda may make the two maps nearly cancel, which amplifies RoPE's float32 angles.
FLOAT64_TOLERANCE = 2e-6
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


def plain_flash(query, key, value, attention_mask, query_length, is_causal, softmax_scale=None, **kwargs):
    """flash-attention's contract in plain PyTorch: (B, T, heads, D) in and out, unpadded or packed rows, one width."""
    if query.shape[-1] != value.shape[-1]:
        raise AssertionError("flash attention needs values as wide as keys")
    batch, tokens, heads = query.shape[:3]
    length = key.shape[1]
    key, value = (states.repeat_interleave(heads // key.shape[2], dim=2) for states in (key, value))
    index = torch.arange(length)
    seen = (index[None, :] <= index[-tokens:, None])[None].expand(batch, -1, -1)
    if kwargs.get("sliding_window"):
        seen = seen & (index[None, :] > index[-tokens:, None] - kwargs["sliding_window"])[None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, :].bool()
    elif tokens == length:
        document = (kwargs["position_ids"].diff(prepend=kwargs["position_ids"][:, :1] - 1) != 1).cumsum(-1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    logits = torch.einsum("bthd,bshd->bhts", query, key) * softmax_scale
    weights = logits.masked_fill(~seen[:, None], -1e4).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, value)


@pytest.fixture(autouse=True)
def _plain_backends(monkeypatch):
    """FlexAttention runs without compiling, flash attention through `plain_flash`: the rest of their path is real."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", plain_flash)
    with torch.compiler.set_stance("force_eager"):
        yield


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def flash_needs_half(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to test with: flash refuses float32, so float64 stands in for it on CPU."""
    return torch.float64 if backend.startswith("flash") and dtype == torch.float32 else dtype


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_match_the_reference_by_dtype(backend, dtype):
    dtype = flash_needs_half(backend, dtype)
    sizes = {"ratio": 4, "head_dim": 16, "initializer_range": 0.1, "lambda_std_dev": 0.1}
    model = small_model(attention=backend, dtype=dtype, **sizes)
    ids = random_ids(2, 21)
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.stack([reference_logits(model, row) for row in ids])
    assert logits.dtype == dtype
    assert relative_error(logits, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("layout", ["left", "right", "packed", "cu_seq_lens"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_right(backend, layout, window):
    overrides = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model = small_model(attention=backend, dtype=torch.float64, ratio=3, **overrides)
    lengths = (5, 11, 1, 7)
    documents = [random_ids(1, length, seed=length)[0] for length in lengths]
    row = torch.cat(documents)[None]
    with torch.no_grad():
        if layout == "packed":
            position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
            outputs = model(row, position_ids=position_ids).logits[0].split(lengths)
        elif layout == "cu_seq_lens":
            boundaries = torch.tensor([0, 5, 16, 17, 24], dtype=torch.int32)
            outputs = model(row, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries).logits[0].split(lengths)
        else:
            width = max(lengths)
            spans = [slice(width - n, None) if layout == "left" else slice(0, n) for n in lengths]
            ids = torch.zeros(len(lengths), width, dtype=torch.long)
            for index, (span, document) in enumerate(zip(spans, documents, strict=True)):
                ids[index, span] = document
            logits = model(ids, attention_mask=(ids != 0).long()).logits
            outputs = [logits[index, span] for index, span in enumerate(spans)]
    for output, document in zip(outputs, documents, strict=True):
        assert relative_error(output, reference_logits(model, document)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("backend", "kind"),
    # Flash attention and a static cache: the backend cuts the cache by itself, which `plain_flash` does not imitate.
    [(backend, "dynamic") for backend in BACKENDS] + [(backend, "static") for backend in BACKENDS[:3]],
)
def test_caches_of_every_kind_continue_rightly(backend, kind, window):
    overrides = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model = small_model(attention=backend, dtype=torch.float64, ratio=3, **overrides)
    ids = random_ids(2, 15)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    parts, start = [], 0
    with torch.no_grad():
        for step in (6, 1, 1, 4, 1, 2):
            part = ids[:, start : start + step]
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
            start += step
    logits = torch.cat(parts, dim=1)
    for index, row in enumerate(ids):
        assert relative_error(logits[index], reference_logits(model, row)) < FLOAT64_TOLERANCE


def test_packed_rows_stay_apart_with_a_cache_asked_for():
    model = small_model(attention="sdpa", dtype=torch.float64)
    first, second = random_ids(1, 6)[0], random_ids(1, 9, seed=1)[0]
    position_ids = torch.cat([torch.arange(6), torch.arange(9)])[None]
    with torch.no_grad():
        logits = model(torch.cat([first, second])[None], position_ids=position_ids, use_cache=True).logits[0]
    assert relative_error(logits[6:], reference_logits(model, second)) < FLOAT64_TOLERANCE


def test_a_four_dimensional_mask_is_used_as_it_is():
    model = small_model(attention="sdpa", dtype=torch.float64)
    ids = random_ids(1, 8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:, 0] = torch.arange(8) == 0
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask[None, None]).logits[0, 1:]
        without = model(ids[:, 1:], position_ids=torch.arange(1, 8)[None]).logits[0]
    torch.testing.assert_close(hidden, without)
    with pytest.raises(ValueError, match="has 6 heads: signal and noise heads share one mask"):
        model(ids, attention_mask=mask[None, None].expand(1, 6, 8, 8))


def test_attentions_are_the_differential_map():
    model = small_model(attention="eager", dtype=torch.float64, ratio=3)
    ids = random_ids(1, 9)
    record = {}
    reference_logits(model, ids[0], record)
    with torch.no_grad():
        outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(layer.shape) for layer in outputs.attentions] == [(1, 6, 9, 9)] * 2
    for actual, expected in zip(outputs.attentions, record["attentions"], strict=True):
        torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-6)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(1, 9, 32)] * 3
    assert model(ids).attentions is None


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2"])
def test_a_backend_without_probabilities_says_so(backend):
    model = small_model(attention=backend)
    with pytest.raises(ValueError, match=f"output_attentions needs every probability.*{backend}"):
        model(random_ids(1, 4), output_attentions=True)


def test_flash_refuses_float32():
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        small_model(attention="flash_attention_2")(random_ids(1, 4))


def count_calls(module, query, key, value, attention_mask, **kwargs):
    """A user's own backend: plain SDPA that insists on values as wide as keys."""
    assert key.shape[-1] == value.shape[-1]
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(module.num_key_value_groups, dim=1),
        value.repeat_interleave(module.num_key_value_groups, dim=1),
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=kwargs["scaling"],
    ).transpose(1, 2), None


def test_a_backend_of_ones_own_works_once_its_mask_is_registered():
    AttentionInterface.register("mine", count_calls)
    model = small_model(attention="mine", dtype=torch.float64)
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match=r"attn_implementation='mine' cannot run.*has no registered mask"):
        model(ids)
    AttentionMaskInterface.register("mine", sdpa_mask)
    with torch.no_grad():
        assert relative_error(model(ids).logits[0], reference_logits(model, ids[0])) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("backend", ["paged|sdpa", "paged|eager"])
def test_paged_caches_are_refused(backend):
    with pytest.raises(ValueError, match="pages its cache"):
        small_model(attention=backend)(random_ids(1, 4))


def test_the_backend_can_be_changed_on_a_built_model():
    model = small_model(attention="eager", dtype=torch.float64)
    ids = random_ids(1, 7)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(model(ids).logits, expected)
