"""The form for serving engines: one plain attention call a layer, its head counts told by the configuration."""

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.modeling_motif2.builders import random_ids, small_config, small_model


def for_engines(model):
    """The same weights under the configuration for engines."""
    config = model.config.for_engines()
    config._attn_implementation = model.config._attn_implementation
    twin = Motif2ForCausalLM(config).eval().to(model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("plain", [False, True])
def test_one_call_computes_the_same(attention, plain):
    overrides = {"ratio": 1, "num_noise_heads": None} if plain else {"ratio": 3}
    model = small_model(attention=attention, dtype=torch.float64, **overrides)
    engine = for_engines(model)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            keep = slice(3, None) if inputs else slice(None)
            torch.testing.assert_close(engine(ids, **inputs).logits[:, keep], model(ids, **inputs).logits[:, keep])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for cache in ("dynamic", "static"):
        generated = engine.generate(ids, cache_implementation=cache, **options)
        assert torch.equal(generated, model.generate(ids, **options))


def test_gradients_are_the_same():
    model = small_model(attention="sdpa", dtype=torch.float64, ratio=3)
    engine = for_engines(model)
    ids = random_ids(2, 9)
    for each in (model, engine):
        each(ids, labels=ids).loss.backward()
    for mine, theirs in zip(engine.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


class PlainEngine:
    """One layer's attention as serving engines see it: flat tokens, heads as configured, its own cache."""

    def __init__(self, config: Motif2Config):
        self.heads, self.key_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.keys = self.values = None
        self.calls = 0

    def __call__(self, query, key, value, scale):
        self.calls += 1
        query = query.view(-1, self.heads, self.dim)
        key, value = key.view(-1, self.key_heads, self.dim), value.view(-1, self.key_heads, self.dim)
        self.keys = key if self.keys is None else torch.cat([self.keys, key])
        self.values = value if self.values is None else torch.cat([self.values, value])
        repeats, tokens, length = self.heads // self.key_heads, len(query), len(self.keys)
        keys, values = (states.repeat_interleave(repeats, dim=1) for states in (self.keys, self.values))
        logits = torch.einsum("thd,shd->hts", query, keys) * scale
        seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        out = torch.einsum("hts,shd->thd", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)
        return out.reshape(tokens, -1)


def engine_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """How an engine registers itself: a layer's index finds its cache, and tokens come flattened."""
    assert attention_mask is None
    query, key, value = (states.transpose(1, 2).reshape(query.shape[2], -1) for states in (query, key, value))
    return attention_instances[module.layer_idx](query, key, value, scaling), None


AttentionInterface.register("plain_engine", engine_attention)


def test_an_engine_with_its_own_cache_gives_the_same_logits():
    model = small_model(attention="sdpa", dtype=torch.float64, ratio=3)
    engine = for_engines(model)
    engine.config._attn_implementation = "plain_engine"
    ids = random_ids(1, 10)
    layers = {index: PlainEngine(engine.config) for index in range(2)}
    with torch.no_grad():
        expected = model(ids).logits
        parts = [
            engine(
                ids[:, start:end],
                position_ids=torch.arange(start, end)[None],
                attention_instances=layers,
                use_cache=False,
                return_dict=False,
            )[0]
            for start, end in ((0, 6), (6, 7), (7, 10))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    assert [layer.calls for layer in layers.values()] == [3, 3]
    assert layers[0].keys.shape == (10, engine.config.num_key_value_heads, engine.config.head_dim)


def test_the_usual_form_is_refused_by_an_engine_with_the_mend():
    model = small_model()
    model.config._attn_implementation = "plain_engine"
    with pytest.raises(ValueError, match='layout="engine"'):
        model(random_ids(1, 4), attention_instances={})


def test_continuous_batching_runs_on_the_engine_form():
    model = small_model(attention="sdpa", ratio=3)
    engine = for_engines(model)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (4, 7)]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Without these limits the cache would take most of the machine's memory.
    limits = ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=64)
    results = engine.generate_batch(prompts, generation_config=config, continuous_batching_config=limits)
    generated = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    for prompt in prompts:
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert generated[tuple(prompt)] == expected[0, len(prompt) :].tolist()


def test_saving_for_engines(tmp_path):
    model = small_model(attention="sdpa", ratio=3)
    model.save_pretrained(tmp_path, layout="engine")
    engine = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert engine.config.single_attention_call
    assert (engine.config.num_attention_heads, engine.config.num_key_value_heads) == (4 * 2 * 3, 4 * 2)
    assert engine.config.auto_map["AutoModel"] == "modeling_motif2.Motif2Model"
    assert not model.config.single_attention_call
    assert "6 signal and 2 noise heads in 2 groups" in (tmp_path / "README.md").read_text()
    ids = random_ids(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(engine(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert engine.config.for_engines().to_diff_dict() == engine.config.to_diff_dict()
    with pytest.raises(ValueError, match="no official layout"):
        engine.save_pretrained(tmp_path / "official", layout="official")
    assert not (tmp_path / "official").exists()


def test_a_wrong_count_is_refused():
    with pytest.raises(ValueError, match=r"make it with `Motif2Config.for_engines`"):
        small_config(single_attention_call=True)
