"""Maximum logits, output norms and lambda by layer, against the float64 reference."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import StaticCache

from modeling_motif2 import attention, modeling_motif2
from modeling_motif2.diagnostics import (
    LayerStatistics,
    attention_modules,
    attention_statistics,
    record_attention,
    reset_max_logits,
    track_max_logits,
)
from tests.modeling_motif2.builders import random_ids, small_model
from tests.modeling_motif2.reference import layer_lambda, reference_logits


def expected_statistics(model, documents):
    """Reference maxima {(layer, head): value} over documents, and the record of the last one."""
    largest = {}
    for document in documents:
        record = {}
        reference_logits(model, document, record)
        for key, value in record["max_logits"].items():
            largest[key] = max(largest.get(key, -float("inf")), float(value))
    return largest, record


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["rows", "left", "right", "packed"])
def test_max_logits_match_the_reference(attention, layout):
    model = small_model(attention=attention, ratio=3)
    documents = [random_ids(1, length, seed=length)[0] for length in (9, 14)]
    track_max_logits(model)
    track_max_logits(model)
    with torch.no_grad():
        if layout == "packed":
            model(torch.cat(documents)[None], position_ids=torch.cat([torch.arange(9), torch.arange(14)])[None])
        elif layout == "rows":
            for document in documents:
                model(document[None])
        else:
            pad = torch.zeros(5, dtype=torch.long)
            short = torch.cat([pad, documents[0]] if layout == "left" else [documents[0], pad])
            ids = torch.stack([short, documents[1]])
            model(ids, attention_mask=(ids != 0).long())
    largest, _ = expected_statistics(model, documents)
    for layer, attention_module in enumerate(attention_modules(model)):
        expected = torch.tensor([largest[layer, head] for head in range(8)])
        torch.testing.assert_close(attention_module.max_logits, expected, rtol=1e-4, atol=1e-4)
    reset_max_logits(model)
    assert all(torch.isneginf(module.max_logits).all() for module in attention_modules(model))
    track_max_logits(model, enabled=False)
    assert all(module.max_logits is None for module in attention_modules(model))


def test_tracking_leaves_values_and_gradients_alone_and_survives_checkpointing():
    plain, tracked = small_model(attention="sdpa"), small_model(attention="sdpa")
    tracked.gradient_checkpointing_enable()
    track_max_logits(tracked)
    ids = random_ids(2, 11)
    for model in (plain, tracked):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    for expected, parameter in zip(plain.parameters(), tracked.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    largest, _ = expected_statistics(plain, ids)
    for layer, module in enumerate(attention_modules(tracked)):
        expected = torch.tensor([largest[layer, head] for head in range(6)])
        torch.testing.assert_close(module.max_logits, expected, rtol=1e-4, atol=1e-4)
        assert not module.max_logits.requires_grad


def test_forwards_without_gradients_can_be_left_out():
    model = small_model(attention="sdpa")
    track_max_logits(model, only_with_grad=True)
    track_max_logits(model)  # asks for exact maxima, and leaves alone which forwards count
    first, second = random_ids(2, 9).split(1)
    with torch.no_grad():
        model(first)
    model.generate(first, max_new_tokens=2)
    assert all(torch.isneginf(module.max_logits).all() for module in attention_modules(model))
    recorded = attention_statistics(model, input_ids=first)
    assert all(layer.max_logits.isfinite().all() for layer in recorded)
    model(second)
    largest, _ = expected_statistics(model, second)
    for layer, module in enumerate(attention_modules(model)):
        expected = torch.tensor([largest[layer, head] for head in range(6)])
        torch.testing.assert_close(module.max_logits, expected, rtol=1e-4, atol=1e-4)


def test_a_tracking_that_began_in_inference_goes_on_in_training():
    model, ids = small_model(attention="sdpa"), random_ids(1, 6)
    with torch.inference_mode():
        track_max_logits(model)
        model(ids)
    before = [module.max_logits.clone() for module in attention_modules(model)]
    model(ids, labels=ids).loss.backward()
    for module, value in zip(attention_modules(model), before, strict=True):
        torch.testing.assert_close(module.max_logits, value)


def test_the_backbone_alone_tracks_too():
    model = small_model()
    track_max_logits(model)
    model.model(random_ids(1, 6))
    assert all(torch.isfinite(module.max_logits).all() for module in attention_modules(model))


def test_one_call_returns_every_statistic_by_layer():
    model = small_model(attention="sdpa", ratio=3)
    ids = random_ids(1, 12)
    statistics = attention_statistics(model, input_ids=ids)
    record = {}
    reference_logits(model, ids[0], record)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for layer, layer_statistics in enumerate(statistics):
        assert layer_statistics.layer == layer
        expected_lambda = layer_lambda(weights, f"model.layers.{layer}.self_attn", layer)
        assert layer_statistics.lambda_value == pytest.approx(float(expected_lambda), rel=1e-5)
        for name, heads, actual in (
            ("signal_norms", 6, layer_statistics.signal_norms),
            ("noise_norms", 2, layer_statistics.noise_norms),
            ("max_logits", 8, layer_statistics.max_logits),
        ):
            expected = torch.stack([record[name][layer, head] for head in range(heads)]).float()
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=name)
        share = (
            abs(float(expected_lambda)) * layer_statistics.noise_norms.mean() / layer_statistics.signal_norms.mean()
        )
        assert layer_statistics.noise_share == pytest.approx(float(share), rel=1e-5)
    assert all(module.max_logits is None and module.output_norms is None for module in attention_modules(model))


def test_the_noise_share_of_a_negative_lambda_is_positive():
    layer = LayerStatistics(0, -0.5, torch.tensor([3.0, 1.0]), torch.tensor([1.0]), None)
    assert layer.noise_share == 0.25


def test_recording_does_not_count_padding_and_keeps_an_earlier_tracking():
    model = small_model(attention="sdpa")
    ids = random_ids(1, 8)
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    alone = attention_statistics(model, input_ids=ids)
    track_max_logits(model)
    with torch.no_grad(), record_attention(model) as recorded:
        model(padded, attention_mask=(padded != 0).long())
    for expected, actual in zip(alone, recorded, strict=True):
        torch.testing.assert_close(actual.noise_norms, expected.noise_norms)
        torch.testing.assert_close(actual.signal_norms, expected.signal_norms)
        torch.testing.assert_close(actual.max_logits, expected.max_logits)
    assert all(torch.isneginf(module.max_logits).all() for module in attention_modules(model))


def test_a_bias_that_is_added_to_the_logits_hides_nothing():
    model, ids = small_model(attention="sdpa"), random_ids(1, 8)
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
    biased = torch.full((1, 1, 8, 8), -1.0).masked_fill(hidden, torch.finfo(torch.float32).min)
    found = attention_statistics(model, input_ids=ids, attention_mask=biased)
    compare(found, attention_statistics(model, input_ids=ids))


def test_layers_put_off_to_disk_are_recorded_too(tmp_path):
    model = small_model(attention="sdpa")
    model.save_pretrained(tmp_path)
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert split.model.layers[1].self_attn.lambda_q1.is_meta
    ids = random_ids(1, 8)
    compare(attention_statistics(split, input_ids=ids), attention_statistics(model, input_ids=ids))


def compare(found, expected):
    """Asserts that two lists of statistics agree."""
    for mine, other in zip(found, expected, strict=True):
        assert mine.lambda_value == pytest.approx(other.lambda_value)
        for name in ("noise_norms", "signal_norms", "max_logits"):
            torch.testing.assert_close(getattr(mine, name), getattr(other, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "gda_kernel"])
def test_generation_with_a_static_cache_is_recorded_as_with_a_growing_one(attention, window):
    overrides = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if window else {}
    model = small_model(attention=attention, ratio=3, **overrides)
    statistics = {}
    for cache in ("static", "dynamic"):
        with torch.compiler.set_stance("force_eager"), record_attention(model) as statistics[cache]:
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
            model.generate(random_ids(2, 6), cache_implementation=cache, **options)
    compare(statistics["static"], statistics["dynamic"])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "gda_kernel"])
def test_forwards_with_a_static_cache_are_recorded(attention):
    model = small_model(attention=attention, ratio=3)
    ids, mask = random_ids(1, 9), torch.ones(1, 9)
    mask[:, :2] = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = attention_statistics(model, input_ids=ids, attention_mask=mask)
        cache = StaticCache(model.config, max_cache_len=16)
        with record_attention(model) as found:
            model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache, use_cache=True)
            model(ids[:, 5:], attention_mask=mask, past_key_values=cache, use_cache=True)
    compare(found, expected)


def test_a_mask_that_cannot_be_read_is_refused():
    model = small_model(attention="sdpa")
    with pytest.raises(ValueError, match="cannot be recorded through a prepared mask of 2 dimensions"):
        attention_statistics(model, input_ids=random_ids(1, 4), attention_mask={"full_attention": torch.ones(1, 4)})


def test_nothing_is_computed_while_off(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("diagnostics ran while they are off")

    monkeypatch.setattr(modeling_motif2, "visible_positions", refuse)
    for name in ("update_max_logits", "update_output_norms", "raise_max_logits"):
        monkeypatch.setattr(attention, name, refuse)
    model = small_model(attention="sdpa")
    model(random_ids(1, 6), labels=random_ids(1, 6)).loss.backward()
    model.generate(random_ids(1, 6), max_new_tokens=2)
    track_max_logits(model)
    with pytest.raises(AssertionError, match="while they are off"):
        model(random_ids(1, 6))


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no Motif2Attention"):
        track_max_logits(torch.nn.Linear(2, 2))
