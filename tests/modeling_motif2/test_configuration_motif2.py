"""Bad configurations raise at construction with the mend; good ones survive a round trip."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.modeling_motif2.builders import small_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 7}, r"num_attention_heads=7 is not a multiple .* of num_noise_heads=2"),
        ({"num_attention_heads": 2}, r"at least twofold"),
        ({"num_noise_heads": 0}, r"num_noise_heads=0"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 is odd: every group owns two keys, use 4"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads=8 does not fit 2 groups: .* use 4"),
        ({"num_noise_heads": None, "num_attention_heads": 5}, r"num_attention_heads=5 is odd .* even number"),
        ({"head_dim": None}, r"head_dim is missing while num_noise_heads=2: .* set head_dim"),
        ({"head_dim": 7}, r"head_dim=7 must be even"),
        ({"hidden_act": "silu"}, r"hidden_act='silu' is not built"),
        ({"k_ratio": 2}, r"k_ratio=2 is not defined by the report: use k_ratio=1"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0.1 .* use 0"),
        ({"use_bias": True}, r"use_bias=True is not built"),
        ({"attention_bias": True}, r"attention_bias=True is not built"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be at least 1"),
        ({"eos_token_id": 61}, r"eos_token_id=61 lies outside the vocabulary of 61"),
        ({"eos_token_id": [2, 99]}, r"eos_token_id=99 lies outside"),
        ({"use_sliding_window": True}, r"use_sliding_window=True needs sliding_window >= 1 .* got None"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps=-1e-06 must not be negative"),
        ({"attn_rms_norm_eps": -1.0}, r"attn_rms_norm_eps=-1.0 must not be negative"),
        ({"initializer_range": -0.02}, r"initializer_range=-0.02 must not be negative"),
        ({"lambda_std_dev": float("nan")}, r"lambda_std_dev=nan must not be negative"),
        ({"rope_theta": 0.0}, r"rope_theta=0.0 must be positive"),
        ({"rope_theta": -5.0}, r"rope_theta=-5.0 must be positive"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            r"rope_theta=10000.0 contradicts rope_parameters, whose rope_theta is 1000000.0",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not built: .* leave it out"),
        (
            {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
            r"rope_type='nonsense' is unknown: use one of default, .*yarn",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
            r"max_window_layers=3 is not one of the 2 layers: .* use 0 to 2",
        ),
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": -1}, r"max_window_layers=-1"),
        ({"layer_types": ["sliding_attention"] * 2}, r"layer_types=.* leave layer_types out"),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types=.* contradicts num_hidden_layers=2"),
        (
            {"num_noise_heads": None, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": None},
            r"hidden_size=32 is not a multiple of num_attention_heads=6, .* set head_dim",
        ),
        (
            {"num_noise_heads": None, "num_attention_heads": 0, "head_dim": None},
            r"num_attention_heads=0 is odd",
        ),
    ],
)
def test_contradictions_are_refused_with_the_mend(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


def test_a_mistyped_key_is_warned_of_and_official_extras_are_not():
    with pytest.warns(UserWarning, match="num_hiden_layers is no field .* is num_hidden_layers meant"):
        small_config(num_hiden_layers=3)
    extras = {"expanded": True, "fused_rope": True, "rope_scaling": None, "use_bias": False, "torch_dtype": "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_config(**extras, num_labels=3, classifier_dropout=0.1, attn_implementation="sdpa")


def test_defaults_are_the_published_model():
    config = Motif2Config()
    assert (config.num_groups, config.num_signal_heads_per_group, config.head_dim) == (8, 4, 128)
    assert config.rope_parameters == {"rope_theta": 1_000_000.0, "rope_type": "default"}
    assert config.layer_types == ["full_attention"] * 40
    assert config.sliding_window is None


def test_a_field_of_the_wrong_type_is_refused():
    with pytest.raises(Exception, match="hidden_size"):
        small_config(hidden_size="wide")


def test_windows_begin_at_the_given_layer():
    config = small_config(layers=4, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert small_config(sliding_window=3).sliding_window is None


def test_keywords_at_loading_count_like_those_at_construction(tmp_path):
    small_config(layers=3).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2).layer_types == ["full_attention"] * 2
    windows = AutoConfig.from_pretrained(tmp_path, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert windows.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        AutoConfig.from_pretrained(tmp_path, head_dim=7)
    _, unused = AutoConfig.from_pretrained(tmp_path, use_cache=False, of_nobody=1, return_unused_kwargs=True)
    assert unused == {"of_nobody": 1}
    official = small_config(layers=3).to_official_dict()
    assert Motif2Config.from_dict(dict(official), num_hidden_layers=1).layer_types == ["full_attention"]


def test_attributes_set_after_construction_count_when_a_model_is_made():
    config = small_config()
    config.num_hidden_layers, config.use_sliding_window, config.sliding_window = 1, True, 2
    model = Motif2ForCausalLM(config).eval()
    assert config.layer_types == ["sliding_attention"]
    far, near = (model(torch.tensor([[first, 4, 5, 6]])).logits[0, -1] for first in (3, 9))
    assert torch.equal(far, near)
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads=3 is odd"):
        Motif2ForCausalLM(config)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 8),
    ratio=st.integers(1, 8),
    head_dim=st.integers(1, 16).map(lambda half: 2 * half),
    theta=st.floats(1.0, 1e7),
    tied=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 9)),
    plain=st.booleans(),
)
def test_configurations_survive_both_layouts(tmp_path_factory, groups, ratio, head_dim, theta, tied, window, plain):
    folder = tmp_path_factory.mktemp("config")
    config = small_config(
        groups=groups,
        ratio=1 if plain else ratio,
        head_dim=head_dim,
        rope_theta=theta,
        tie_word_embeddings=tied,
        use_sliding_window=window is not None,
        sliding_window=window,
        **({"num_noise_heads": None} if plain else {}),
    )
    config.save_pretrained(folder)
    again = AutoConfig.from_pretrained(folder)
    assert again.to_diff_dict() == config.to_diff_dict()
    (folder / "config.json").write_text(json.dumps(config.to_official_dict()))
    official = AutoConfig.from_pretrained(folder)
    fields = set(Motif2Config.__dataclass_fields__) - {
        "architectures",
        "transformers_version",
        "lambda_std_dev",
        "dtype",
        "auto_map",
    }
    assert {name: getattr(official, name) for name in fields} == {name: getattr(config, name) for name in fields}


def test_a_scaled_rope_survives_the_official_layout(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 128}
    config = small_config(rope_parameters=rope, rope_theta=None)
    written = config.to_official_dict()
    assert written["rope_theta"] == 1e6
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = AutoConfig.from_pretrained(tmp_path)
    assert {name: again.rope_parameters[name] for name in rope} == rope
