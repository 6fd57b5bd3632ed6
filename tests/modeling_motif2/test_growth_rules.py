"""Growth's rules, one by one and together, on tensors in memory."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from modeling_motif2.attention import lambda_init
from modeling_motif2.growth_plan import Block, Growth, schedule, tensor_shapes
from modeling_motif2.growth_rules import MatrixRule, ZeroRule, compensate_lambda, growth_rules, signal_copies
from tests.modeling_motif2.builders import random_ids, small_model
from tests.modeling_motif2.reference import reference_logits

ATTENTION = "model.layers.{}.self_attn."


class TensorsInMemory(dict):
    """A source of tensors that reads from a state dict."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self[name][start:stop]


def pair_model(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides):
    """A small model in the style of Motif-2.6B: plain pairs."""
    return small_model(seed, dtype=dtype, **({"ratio": 1, "num_noise_heads": None} | overrides))


def grow_in_memory(model, dtype: torch.dtype = torch.float64, **settings):
    """The grown model and its growth."""
    growth = Growth(model.config, **settings)
    config = type(model.config).from_dict(model.config.to_dict() | growth.config_changes())
    config._attn_implementation = "eager"
    source = TensorsInMemory(model.state_dict())
    state = {
        name: torch.cat(list(rule.blocks(source, dtype, name))) for name, rule in growth_rules(growth, config).items()
    }
    grown = Motif2ForCausalLM(config).to(dtype).eval()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    grown.load_state_dict(state)
    return grown, growth


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def logits_error(grown, model) -> float:
    ids = random_ids(2, 13)
    return relative_error(grown(ids).logits, model(ids).logits)


ALONE_AND_TOGETHER = [
    {"width": 2},
    {"width": 3},
    {"signal_ratio": 4},
    {"signal_ratio": 3},
    {"signal_ratio": 8},
    {"insert_after": (1, 3)},
    {"insert_after": (0, 0, 2)},
    {"untie": True},
    {"width": 2, "signal_ratio": 4},
    {"width": 3, "insert_after": (3,)},
    {"signal_ratio": 2, "insert_after": (0, 1, 2, 3)},
    {"width": 2, "signal_ratio": 4, "insert_after": (3,)},
]


WITH_NOISE = [steps | {"noise_snr_db": 10.0} for steps in ALONE_AND_TOGETHER if {"width", "signal_ratio"} & set(steps)]


@pytest.mark.parametrize("steps", ALONE_AND_TOGETHER + WITH_NOISE, ids=str)
def test_the_function_is_preserved(steps):
    model = pair_model(layers=4, tie_word_embeddings=True)
    grown, _ = grow_in_memory(model, **steps)
    assert logits_error(grown, model) < 1e-12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape_keeps_its_function(data):
    draw = data.draw
    groups, ratio, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    plain = ratio == 1 and draw(st.booleans())
    model = small_model(
        draw(st.integers(0, 99)),
        dtype=torch.float64,
        groups=groups,
        ratio=ratio,
        layers=layers,
        num_noise_heads=None if plain else groups,
        hidden_size=draw(st.integers(3, 20)),
        intermediate_size=draw(st.integers(1, 20)),
        head_dim=2 * draw(st.integers(1, 4)),
        tie_word_embeddings=draw(st.booleans()),
    )
    width, target_ratio = draw(st.integers(1, 3)), draw(st.integers(ratio, 8))
    places = st.lists(st.integers(0, layers - 1), min_size=int(width == 1 and target_ratio == ratio), max_size=4)
    noisy = (width > 1 or target_ratio > ratio) and draw(st.booleans())
    grown, growth = grow_in_memory(
        model,
        width=width,
        signal_ratio=target_ratio,
        insert_after=tuple(sorted(draw(places))),
        noise_snr_db=draw(st.floats(0, 40)) if noisy else None,
    )
    assert logits_error(grown, model) < 1e-12
    assert grown.config.num_signal_heads_per_group == target_ratio
    assert len(grown.model.layers) == len(growth.blocks)


def test_the_grown_model_agrees_with_the_written_description():
    model = pair_model(layers=4, tie_word_embeddings=True)
    grown, _ = grow_in_memory(model, width=2, signal_ratio=4, insert_after=(3,), noise_snr_db=20)
    ids = random_ids(1, 11)[0]
    model.config.tie_word_embeddings = (
        False  # the reference reads the head from the state dict, where it is in any case
    )
    assert relative_error(reference_logits(grown, ids), reference_logits(model, ids)) < 1e-12


def test_the_tensors_are_those_of_the_published_table():
    model = pair_model(layers=1, groups=2, tie_word_embeddings=True)
    grown, _ = grow_in_memory(model, width=2, signal_ratio=4)
    old, new = model.state_dict(), grown.state_dict()
    attention, dim = ATTENTION.format(0), model.config.head_dim

    def twice(name):
        return torch.cat([old[name], old[name]], dim=-1)

    assert torch.equal(new["model.embed_tokens.weight"], twice("model.embed_tokens.weight"))
    assert torch.equal(new["lm_head.weight"], twice("model.embed_tokens.weight") / 2)
    for norm in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(new[norm], twice(norm))
    q1, q2 = (twice(f"{attention}q_proj.weight").view(2, 2, dim, -1)[:, i] for i in (0, 1))
    striped = torch.stack([q1, q1, q1, q1, q2], dim=1) / 2
    assert torch.equal(new[f"{attention}q_proj.weight"], striped.flatten(0, 2))
    for name in ("k_proj", "v_proj"):
        assert torch.equal(new[f"{attention}{name}.weight"], twice(f"{attention}{name}.weight") / 2)
    blocks = old[f"{attention}o_proj.weight"].view(-1, 2, 1, 2 * dim).expand(-1, 2, 4, 2 * dim).flatten(1) / 4
    assert torch.equal(new[f"{attention}o_proj.weight"], torch.cat([blocks, blocks]))
    for name in ("gate", "up", "down"):
        weight = twice(f"model.layers.0.mlp.{name}_proj.weight") / 2
        assert torch.equal(new[f"model.layers.0.mlp.{name}_proj.weight"], torch.cat([weight, weight]))
    for name in ("self_attn.subln.weight", "self_attn.lambda_q2", "mlp.act_fn.weight", "mlp.act_fn.bias"):
        assert torch.equal(new[f"model.layers.0.{name}"], old[f"model.layers.0.{name}"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [{"width": 3}, {"signal_ratio": 7}, {"width": 2, "signal_ratio": 3}], ids=str)
def test_stored_copies_sum_to_the_source_in_every_dtype(dtype, steps):
    """A third of a weight has no exact bfloat16; the last copy makes up for it."""
    model = pair_model(layers=2, dtype=dtype)
    grown, _ = grow_in_memory(model, dtype=dtype, **steps)
    model.config.tie_word_embeddings = False
    assert logits_error(grown.double(), model.double()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("noise_snr_db", [None, 20.0])
@torch.no_grad()
def test_in_half_precision_growth_adds_no_noise_of_its_own(dtype, noise_snr_db):
    model = pair_model(layers=4, dtype=dtype, tie_word_embeddings=True)
    grown, _ = grow_in_memory(model, dtype, width=2, signal_ratio=4, insert_after=(3,), noise_snr_db=noise_snr_db)
    ids = random_ids(4, 32)
    low_source, low_grown = model(ids).logits.double(), grown(ids).logits.double()
    exact = model.double()(ids).logits
    assert (low_grown - exact).norm() < 1.5 * (low_source - exact).norm()


def test_noise_changes_weights_at_the_wanted_ratio_but_not_the_function():
    model = pair_model(layers=2, hidden_size=64, intermediate_size=96)
    plain, _ = grow_in_memory(model, width=3, signal_ratio=4)
    noisy, _ = grow_in_memory(model, width=3, signal_ratio=4, noise_snr_db=12)
    assert logits_error(noisy, plain) < 1e-12
    for name, weight in plain.state_dict().items():
        noise = noisy.state_dict()[name] - weight
        if name.endswith("_proj.weight"):
            ratio_db = 20 * math.log10(weight.norm() / noise.norm())
            assert ratio_db == pytest.approx(12, abs=0.3), name
            period = 2 * model.config.head_dim if "o_proj" in name else 96 if "down_proj" in name else 64
            copies = noise.view(len(noise), -1, period)
            assert not torch.allclose(copies[:, 0], copies[:, 1])
        else:
            assert not noise.any(), name


def test_noise_of_three_copies_is_even_and_sums_to_zero():
    rule = MatrixRule((4000, 9), "w", torch.zeros(4000, dtype=torch.long), torch.arange(3).repeat(3), True, 6.0)
    source = TensorsInMemory(w=torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64))
    grown = torch.cat(list(rule.blocks(source, torch.float64, "w"))).view(4000, 3, 3)
    noise = grown - source["w"] / 3
    assert noise.sum(dim=1).abs().max() < 1e-15
    expected = 10 ** (-6 / 20) / 3
    assert torch.allclose(noise.std(dim=(0, 2)), torch.full((3,), expected, dtype=torch.float64), rtol=0.05)
    correlations = torch.corrcoef(noise[:, :, 0].T)[torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)]
    assert torch.allclose(correlations, torch.full((3,), -0.5, dtype=torch.float64), atol=0.05)


def test_noise_depends_on_the_seed_and_the_name():
    rule = MatrixRule((2, 4), "w", torch.arange(2), torch.arange(2).repeat(2), True, 10.0, seed=1)
    source = TensorsInMemory(w=torch.randn(2, 2))

    def grown(rule, name):
        return torch.cat(list(rule.blocks(source, torch.float32, name)))

    other_seed = MatrixRule((2, 4), "w", torch.arange(2), torch.arange(2).repeat(2), True, 10.0, seed=2)
    assert torch.equal(grown(rule, "a"), grown(rule, "a"))
    assert not torch.equal(grown(rule, "a"), grown(rule, "b"))
    assert not torch.equal(grown(rule, "a"), grown(other_seed, "a"))


@torch.no_grad()
def test_without_compensation_a_shifted_layer_computes_something_else():
    model = pair_model(layers=4)
    grown, growth = grow_in_memory(model, insert_after=(0,))
    assert logits_error(grown, model) < 1e-12
    for layer, block in enumerate(growth.blocks):
        for name in ("subln.weight", "lambda_q2", "lambda_k2"):
            original = model.get_parameter(f"{ATTENTION.format(block.source)}{name}")
            grown.get_parameter(f"{ATTENTION.format(layer)}{name}").copy_(original)
    assert logits_error(grown, model) > 1e-2


@pytest.mark.parametrize("vanishing", ["neither", "lambda_q2", "lambda_k2", "both"])
@pytest.mark.parametrize("layers", [(0, 1), (3, 5), (30, 38)])
def test_lambda_keeps_its_value(vanishing, layers):
    query, key = 0.1 * torch.randn(2, 16, dtype=torch.float64)
    query = query * (vanishing not in ("lambda_q2", "both"))
    key = key * (vanishing not in ("lambda_k2", "both"))
    shift = lambda_init(layers[1]) - lambda_init(layers[0])
    new_query, new_key = compensate_lambda(query, key, shift)
    old_lambda = -torch.exp(query @ key) + lambda_init(layers[0])
    new_lambda = -torch.exp(new_query @ new_key) + lambda_init(layers[1])
    assert abs(new_lambda - old_lambda) < 1e-14
    if vanishing == "neither":
        moved, fixed, direction = (
            (new_query - query, (new_key, key), key)
            if key.norm() >= query.norm()
            else (new_key - key, (new_query, query), query)
        )
        assert torch.equal(*fixed)
        assert torch.allclose(moved, (moved @ direction) / (direction @ direction) * direction, atol=1e-15)


def test_inserted_blocks_add_nothing_and_learn():
    model = pair_model(layers=4)
    grown, growth = grow_in_memory(model, width=2, signal_ratio=2, insert_after=(1, 3), noise_snr_db=20)
    assert growth.blocks == tuple(Block(*block) for block in zip((0, 1, 1, 2, 3, 3), (0, 0, 1, 0, 0, 1), strict=True))
    ids = random_ids(2, 12)
    grown(ids, labels=ids).loss.backward()
    for name, parameter in grown.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    for layer in (2, 5):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = grown.get_parameter(f"model.layers.{layer}.{name}.weight")
            assert not weight.any()
            assert weight.grad.norm() > 1e-6
    optimizer = torch.optim.SGD(grown.parameters(), lr=1e-3)
    optimizer.step()
    optimizer.zero_grad()
    grown(ids, labels=ids).loss.backward()
    assert grown.model.layers[2].self_attn.q_proj.weight.grad.norm() > 1e-9


@pytest.mark.parametrize("steps", [{"width": 3}, {"signal_ratio": 8}, {"width": 2, "insert_after": (0, 1)}], ids=str)
@pytest.mark.parametrize("noise_snr_db", [None, 10.0])
def test_first_gradients_are_finite_in_bfloat16(steps, noise_snr_db):
    model = pair_model(layers=2, dtype=torch.bfloat16)
    noise = {"noise_snr_db": noise_snr_db} if {"width", "signal_ratio"} & set(steps) else {}
    grown, growth = grow_in_memory(model, dtype=torch.bfloat16, **steps, **noise)
    ids = random_ids(2, 12)
    grown(ids, labels=ids).loss.backward()
    inserted = tuple(f"model.layers.{i}." for i, block in enumerate(growth.blocks) if block.inserted)
    for name, parameter in grown.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        behind_zeros = name.startswith(inserted) and not name.endswith(("o_proj.weight", "down_proj.weight"))
        assert bool(parameter.grad.any()) is not behind_zeros, name


def test_clones_stay_equal_without_noise_and_part_with_it():
    model = pair_model(layers=2)
    for noise_snr_db, equal in ((None, True), (20.0, False)):
        grown, _ = grow_in_memory(model, width=2, noise_snr_db=noise_snr_db)
        ids = random_ids(2, 12)
        grown(ids, labels=ids).loss.backward()
        upper, lower = grown.model.layers[0].mlp.gate_proj.weight.grad.chunk(2)
        assert torch.allclose(upper, lower, rtol=1e-9, atol=1e-15) is equal


def test_uneven_ratios_copy_every_head():
    assert signal_copies(1, 4) == [0, 0, 0, 0]
    assert signal_copies(2, 4) == [0, 0, 1, 1]
    assert signal_copies(3, 4) == [0, 0, 1, 2]
    assert signal_copies(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_sliding_windows_follow_their_layers():
    model = pair_model(layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    grown, growth = grow_in_memory(model, insert_after=(1, 2))
    expected = [model.config.layer_types[block.source] for block in growth.blocks]
    assert grown.config.layer_types == expected
    assert logits_error(grown, model) < 1e-12


def test_shapes_are_those_of_the_model():
    for model in (pair_model(tie_word_embeddings=True), small_model(ratio=3)):
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            expected.pop("lm_head.weight")
        assert tensor_shapes(model.config) == expected


def test_official_sizes_grow_into_each_other():
    small = Motif2Config(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_noise_heads=None,
        tie_word_embeddings=True,
    )
    growth = Growth(small, width=2, signal_ratio=4, insert_after=schedule(32, 4, None))
    grown = type(small).from_dict(small.to_dict() | growth.config_changes())
    published = Motif2Config()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_noise_heads"):
        assert getattr(grown, name) == getattr(published, name)
    rules = growth_rules(growth, grown)
    assert {name: rule.shape for name, rule in rules.items()} == tensor_shapes(published)
    assert len(rules) == 643
    assert sum(isinstance(rule, ZeroRule) for rule in rules.values()) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"signal_ratio": 1}, "signal_ratio=1 is below the source's 2"),
        ({"insert_after": (4,)}, r"insert_after=\[4\] does not exist"),
        ({"insert_after": (-1,)}, r"insert_after=\[-1\] does not exist"),
        ({"insert_after": (2, 1)}, "must ascend"),
        ({}, "nothing would grow"),
        ({"untie": True}, "nothing would grow"),
        ({"insert_after": (0,), "noise_snr_db": 20.0}, "nothing to act on"),
        ({"width": 2, "noise_snr_db": math.inf}, "noise_snr_db=inf must be finite and 0 or more"),
        ({"width": 2, "noise_snr_db": math.nan}, "noise_snr_db=nan must be finite and 0 or more"),
        ({"width": 2, "noise_snr_db": -1.0}, "noise_snr_db=-1.0 must be finite and 0 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_grown_to_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Growth(small_model(ratio=2, layers=4).config, **settings)


def test_wrong_schedules_are_refused():
    assert schedule(32, 4, None) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert schedule(6, 4, None) == (3,)
    assert schedule(6, None, [1, 1]) == (1, 1)
    for every in (0, -1, 7):
        with pytest.raises(ValueError, match=f"insert_every={every} inserts nothing into 6 layers"):
            schedule(6, every, None)
    with pytest.raises(ValueError, match="exclude each other"):
        schedule(6, 2, [1])
