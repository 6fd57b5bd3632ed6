"""Everything `generate` can do: caches, sampling, beams, assistance, streaming."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, QuantizedCache, QuantizedLayer
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.modeling_motif2.builders import random_ids, small_model

NEW_TOKENS = 9


def generate(model, ids, **options):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, **settings)


@pytest.fixture(scope="module")
def model():
    return small_model(attention="sdpa", dtype=torch.float64, ratio=3)


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 6)


@pytest.fixture(scope="module")
def greedy(model, ids):
    """Tokens chosen by whole forwards without a cache."""
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_caches_do_not_change_what_is_said(model, ids, greedy, cache):
    assert torch.equal(generate(model, ids, cache_implementation=cache), greedy)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_flex_attention_leaves_one_token_to_sdpa(ids, greedy, monkeypatch, cache):
    model = small_model(attention="flex_attention", dtype=torch.float64, ratio=3)
    run, queries = ALL_ATTENTION_FUNCTIONS["flex_attention"], []

    def noted(module, query, *arguments, **options):
        queries.append(query.shape[2])
        return run(module, query, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", noted)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(generate(model, ids, cache_implementation=cache), greedy)
        out = generate(model, padded, cache_implementation=cache, attention_mask=(padded != 0).long())
    assert torch.equal(out[:, 3:], greedy)
    assert set(queries) == {ids.shape[1], padded.shape[1]}


def test_left_padding_does_not_change_what_is_said(model, greedy):
    row = greedy[:1, :6]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    out = generate(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(out[:, 3:], greedy[:1])


class EightBitLayer(QuantizedLayer):
    """Plain int8 rounding by head, so that the cache's machinery runs without a quantisation package."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(dim=(-1, -2), keepdim=True).clamp_min(1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        values, scale = quantized
        return values.to(scale.dtype) * scale


def test_a_quantised_cache_stays_close(model, ids):
    layers = [EightBitLayer(nbits=8, residual_length=4) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        assert cache.layers[0]._quantized_keys[0].dtype == torch.int8
        actual = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    error = (actual - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.05


@pytest.mark.slow  # quanto compiles an extension when first used
@pytest.mark.timeout(900)
def test_the_quantised_cache_of_optimum_quanto_stays_close():
    pytest.importorskip("optimum.quanto")
    model = small_model(attention="sdpa", ratio=3, head_dim=32, initializer_range=0.2)
    ids = random_ids(1, 9)
    settings = {"nbits": 4, "q_group_size": 32, "residual_length": 4}
    cache = QuantizedCache("quanto", model.config, **settings)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        actual = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert 0 < (actual - expected).abs().max() / expected.abs().max() < 0.5
    out = generate(model, ids, cache_implementation="quantized", cache_config={"backend": "quanto", **settings})
    assert out.shape == (1, 9 + NEW_TOKENS)


def test_sampling_is_reproducible_and_the_same_for_static_caches(model, ids):
    outs = []
    for cache in ("dynamic", "dynamic", "static"):
        torch.manual_seed(5)
        outs.append(generate(model, ids, do_sample=True, temperature=0.8, top_k=20, cache_implementation=cache))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], generate(model, ids))


def test_beam_search_finds_the_likeliest_of_all(model):
    ids = random_ids(1, 5)
    out = generate(model, ids, num_beams=61, max_new_tokens=2)
    with torch.no_grad():
        first = model(ids).logits[0, -1].log_softmax(-1)
        pairs = torch.cat([ids.expand(61, -1), torch.arange(61)[:, None]], dim=1)
        scores = first[:, None] + model(pairs).logits[:, -1].log_softmax(-1)
    best = divmod(int(scores.argmax()), 61)
    assert tuple(out[0, -2:].tolist()) == best


def test_a_plain_model_assists_a_grouped_one(model, greedy):
    assistant = small_model(
        seed=3, attention="sdpa", dtype=torch.float64, groups=2, ratio=1, num_noise_heads=None, layers=1
    )
    assert torch.equal(generate(model, greedy[:1, :6], assistant_model=assistant), greedy[:1])
    assert torch.equal(generate(model, greedy[:1, :6], prompt_lookup_num_tokens=3), greedy[:1])


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming_gives_every_token_in_order(model, greedy):
    streamer = Collector()
    generate(model, greedy[:1, :6], streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == greedy[0].tolist()


def test_generation_stops_on_any_of_several_tokens(model, greedy):
    ids, stop = greedy[:1, :6], int(greedy[0, 8])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[60, stop], pad_token_id=0)
    out = model.generate(ids, generation_config=config)
    first = greedy[0, 6:].tolist().index(stop)
    assert out[0].tolist() == greedy[0, : 7 + first].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window_generates_past_its_width(cache):
    model = small_model(
        attention="sdpa", dtype=torch.float64, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    ids = expected = random_ids(1, 6)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids, cache_implementation=cache), expected)
