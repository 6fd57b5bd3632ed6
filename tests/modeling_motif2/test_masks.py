"""Packed documents never see each other, however they are told and whatever else is given beside them."""

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from tests.modeling_motif2 import flash_kernel
from tests.modeling_motif2.builders import random_ids, small_model
from tests.modeling_motif2.reference import reference_logits

TOLERANCE = 2e-6  # RoPE's angles are float32
BACKENDS = ("eager", "sdpa", "flex_attention", "gda_kernel", "flash_attention_2")
BORDERS = torch.tensor([0, 4, 9, 10], dtype=torch.int32)
RESTARTING = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])


@pytest.fixture(autouse=True)
def _plain_backends(monkeypatch):
    flash_kernel.install(monkeypatch)
    with torch.compiler.set_stance("force_eager"):
        yield


def assert_apart(model, logits: torch.Tensor, ids: torch.Tensor, borders: list[int]) -> None:
    """Asserts that one row's logits (T, vocabulary) are those of its documents one by one."""
    for start, end in itertools.pairwise(borders):
        expected = reference_logits(model, ids[start:end])
        assert float((logits[start:end] - expected).abs().max() / expected.abs().max()) < TOLERANCE


def model_of(backend: str):
    """One layer in causal order, one with a window."""
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    return small_model(attention=backend, dtype=torch.float64, ratio=3, **window)


BESIDE = {
    "lengths and positions that go on": lambda: {"cu_seq_lens_q": BORDERS, "position_ids": torch.arange(10)[None]},
    "lengths and positions": lambda: {"cu_seq_lens_q": BORDERS, "position_ids": RESTARTING},
    "lengths of both": lambda: {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS.clone()},
    "lengths and ones": lambda: {"cu_seq_lens_q": BORDERS, "attention_mask": torch.ones(1, 10, dtype=torch.long)},
    "lengths and an empty cache": lambda: {"cu_seq_lens_q": BORDERS, "past_key_values": DynamicCache()},
    "lengths and an empty document": lambda: {"cu_seq_lens_q": torch.tensor([0, 4, 4, 9, 10])},
    "positions and ones": lambda: {"position_ids": RESTARTING, "attention_mask": torch.ones(1, 10)},
    "positions and an empty cache": lambda: {"position_ids": RESTARTING, "past_key_values": DynamicCache()},
    "positions and a cache asked for": lambda: {"position_ids": RESTARTING, "use_cache": True},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_stay_apart(backend, beside):
    model, ids = model_of(backend), random_ids(1, 10)
    with torch.no_grad():
        logits = model(ids, **BESIDE[beside]()).logits[0]
    assert_apart(model, logits, ids[0], BORDERS.tolist())


@pytest.mark.parametrize("backend", BACKENDS[:4])
def test_documents_stay_apart_in_an_empty_static_cache(backend):
    model, ids = model_of(backend), random_ids(1, 10)
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        logits = model(ids, cu_seq_lens_q=BORDERS, past_key_values=cache, use_cache=True).logits[0]
    assert_apart(model, logits, ids[0], BORDERS.tolist())


@pytest.mark.parametrize("padding", ["none", "right", "left", "between"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_stay_apart_in_several_rows_with_padding(backend, padding):
    model = model_of(backend)
    rows = [(4, 6), (7, 3)] if padding == "none" else [(4, 3), (5, 2)]
    ids, mask, position_ids, spans = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10), [], []
    for row, lengths in enumerate(rows):
        gaps = {"none": (0, 0), "right": (0, 0), "left": (3, 0), "between": (1, 2)}[padding]
        end, positions = 0, torch.zeros(10, dtype=torch.long)
        for length, gap in zip(lengths, gaps, strict=True):
            start, end = end + gap, end + gap + length
            ids[row, start:end] = random_ids(1, length, seed=start)[0]
            mask[row, start:end] = 1
            positions[start:end] = torch.arange(length)
            spans.append((row, start, end))
        position_ids.append(positions)
    with torch.no_grad():
        given = {} if padding == "none" else {"attention_mask": mask}
        logits = model(ids, position_ids=torch.stack(position_ids), **given).logits
    for row, start, end in spans:
        assert_apart(model, logits[row, start:end], ids[row, start:end], [0, end - start])


@pytest.mark.parametrize("counted", ["tokens", "places"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_inside_a_document_is_no_border(backend, counted):
    """Whether positions count the padding or leave it out, as `generate` does."""
    sizes = {"dtype": torch.float64, "ratio": 3}
    model, ids = small_model(attention=backend, **sizes), random_ids(1, 7)
    mask, tokens = torch.tensor([[1, 1, 1, 0, 1, 1, 1]]), [0, 1, 2, 4, 5, 6]
    position_ids = torch.arange(7)[None] if counted == "places" else torch.tensor([[0, 1, 2, 2, 3, 4, 5]])
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, tokens]
        alone = small_model(attention="sdpa", **sizes)
        expected = alone(ids[:, tokens], attention_mask=causal, position_ids=position_ids[:, tokens]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_refuses_what_lengths_cannot_say():
    model, ids = model_of("flash_attention_2"), random_ids(1, 7)
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding inside a packed document"):
        model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    cache = StaticCache(model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="in a static cache: use a DynamicCache, or sdpa"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("borders", "rows"), [([0, 4, 8], 1), ([0, 4, 11], 1), ([1, 10], 1), ([0, 6, 4, 10], 1), ([0, 10, 20], 2)]
)
def test_lengths_that_do_not_divide_the_row_are_refused(borders, rows):
    with pytest.raises(ValueError, match=rf"cu_seq_lens_q=.* does not divide one row of 10 tokens \({rows} rows"):
        model_of("sdpa")(random_ids(rows, 10), cu_seq_lens_q=torch.tensor(borders))


def test_lengths_of_the_keys_must_be_those_of_the_queries():
    model, ids = model_of("sdpa"), random_ids(1, 10)
    with pytest.raises(ValueError, match="differs from cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=BORDERS, cu_seq_lens_k=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="without cu_seq_lens_q"):
        model(ids, cu_seq_lens_k=BORDERS)


@pytest.mark.parametrize("given", [{"cu_seq_lens_q": BORDERS}, {"position_ids": RESTARTING}])
def test_documents_do_not_continue_a_cache(given):
    model, ids = model_of("sdpa"), random_ids(1, 10)
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cache"):
        model(ids, past_key_values=cache, **given)


def test_an_ordinary_batch_has_no_mask(monkeypatch):
    """Plain causal order must stay None, which is what fast kernels need."""
    seen = []
    model, ids = model_of("sdpa"), random_ids(2, 10)
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    for given in ({}, {"attention_mask": torch.ones(2, 10)}, {"position_ids": torch.arange(10)[None]}):
        model(ids, **given)
    assert seen == [None, None, None]
