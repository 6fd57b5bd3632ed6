"""Every attention backend against the float64 reference: dtypes, masks, packing, windows, caches, compilation."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask

from tests.modeling_motif2 import flash_kernel
from tests.modeling_motif2.builders import outputs_of_documents, random_ids, small_model
from tests.modeling_motif2.reference import reference_logits

# Largest error of a logit over the largest logit, 2 layers, with lambda as it is initialised.
TOLERANCES = {torch.float64: 2e-7, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# The same in float64 where lambda may make the two maps nearly cancel, which amplifies RoPE's float32 angles.
FLOAT64_TOLERANCE = 2e-6
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


@pytest.fixture(autouse=True)
def _plain_backends(monkeypatch):
    """FlexAttention runs without compiling, flash attention on a plain kernel: the rest of their path is real."""
    flash_kernel.install(monkeypatch)
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
    documents = [random_ids(1, length, seed=length)[0] for length in (5, 11, 1, 7)]
    for output, document in zip(outputs_of_documents(model, layout, documents), documents, strict=True):
        assert relative_error(output, reference_logits(model, document)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("kind", ["bool", "long", "float64"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "gda_kernel"])
def test_a_four_dimensional_mask_is_used_as_it_is(backend, rows, kind):
    model = small_model(attention=backend, dtype=torch.float64)
    ids = random_ids(2, 8)
    mask = torch.ones(rows, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 0] = torch.arange(8) == 0
    if kind == "float64":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)
    mask = mask.to(getattr(torch, kind))
    if backend.startswith("flash"):
        with pytest.raises(ValueError, match="flash_attention_2' takes no mask of queries by keys"):
            model(ids, attention_mask=mask)
        return
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).logits[:, 1:]
        without = model(ids[:, 1:], position_ids=torch.arange(1, 8)[None]).logits
    torch.testing.assert_close(hidden, without)


def test_a_mask_of_another_shape_is_refused():
    model = small_model()
    ids = random_ids(1, 8)
    with pytest.raises(ValueError, match="has 6 heads: signal and noise heads share one mask"):
        model(ids, attention_mask=torch.ones(1, 6, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"has shape \(1, 8, 8\): give \(batch, tokens\)"):
        model(ids, attention_mask=torch.ones(1, 8, 8))


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
    for actual, expected in zip(outputs.hidden_states, record["hidden_states"], strict=True):
        torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-5)
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
