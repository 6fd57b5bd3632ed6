"""Maximum logits, output norms and lambda by layer, against the float64 reference."""

import pytest
import torch

from modeling_motif2.diagnostics import (
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


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no Motif2Attention"):
        track_max_logits(torch.nn.Linear(2, 2))
