"""Parameters find their groups by name, and names that fit nothing are refused."""

import pytest
import torch
from torch import nn

from trainer.optim.groups import group_parameters

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.self_attn.q_proj.weight": (8, 4),
    "model.layers.0.self_attn.lambda_q1": (2,),
    "model.layers.0.self_attn.lambda_k2": (2,),
    "model.layers.0.self_attn.subln.weight": (4,),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.mlp.act_fn.weight": (3,),
    "model.layers.0.mlp.act_fn.bias": (1,),
    "model.layers.0.mlp.down_proj.weight": (4, 16),
    "model.layers.0.mlp.down_proj.bias": (4,),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}


def parameters(**extra) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in (SHAPES | extra).items()]


def test_names_decide():
    groups = {group["group_name"]: group for group in group_parameters(parameters(), lr=0.1)}
    short = {name: [key.removeprefix("model.layers.0.") for key in group["names"]] for name, group in groups.items()}
    assert short == {
        "matrices": ["self_attn.q_proj.weight", "mlp.down_proj.weight"],
        "lambda": ["self_attn.lambda_q1", "self_attn.lambda_k2"],
        "polynorm": ["mlp.act_fn.weight", "mlp.act_fn.bias"],
        "norms": ["self_attn.subln.weight", "input_layernorm.weight", "model.norm.weight"],
        "embeddings": ["model.embed_tokens.weight"],
        "head": ["lm_head.weight"],
        "other": ["mlp.down_proj.bias"],
    }
    assert [name for name, group in groups.items() if group["algorithm"] == "muon"] == ["matrices"]
    assert [name for name, group in groups.items() if group["weight_decay"]] == ["matrices", "embeddings", "head"]


def test_settings_by_group_and_patterns():
    groups = group_parameters(
        parameters(), 0.1, learning_rates={"head": 0.5}, weight_decays={"norms": 0.2}, adamw_patterns=["down_proj"]
    )
    by_name = {group["group_name"]: group for group in groups}
    assert by_name["head"]["lr"] == 0.5
    assert by_name["matrices"]["lr"] == 0.1
    assert by_name["norms"]["weight_decay"] == 0.2
    assert "model.layers.0.mlp.down_proj.weight" in by_name["other"]["names"]


@pytest.mark.parametrize("patterns", ["down_proj", (pattern for pattern in ["q_proj", "down_proj"])])
def test_patterns_may_be_one_string_or_a_generator(patterns):
    groups = {group["group_name"]: group for group in group_parameters(parameters(), 0.1, adamw_patterns=patterns)}
    assert "model.layers.0.mlp.down_proj.weight" in groups["other"]["names"]
    assert ("matrices" in groups) == isinstance(patterns, str)  # the other takes both matrices


def test_frozen_parameters_are_left_out():
    named = parameters()
    named[0][1].requires_grad_(False)
    assert "embeddings" not in {group["group_name"] for group in group_parameters(named, 0.1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adamw_patterns": ["no_such"]}, "no_such"),
        ({"learning_rates": {"heads": 0.1}}, "heads"),
        ({"weight_decays": {"router": 0.1}}, "router"),
    ],
)
def test_names_that_match_nothing_raise(options, message):
    with pytest.raises(ValueError, match=message):
        group_parameters(parameters(), 0.1, **options)


def test_a_matrix_under_an_adamw_only_name_raises():
    with pytest.raises(ValueError, match=r"model\.extra_norm\.weight of shape \(4, 4\)"):
        group_parameters(parameters(**{"model.extra_norm.weight": (4, 4)}), 0.1)


def test_nothing_to_train_raises():
    with pytest.raises(ValueError, match="nothing to optimise"):
        group_parameters([("a.weight", nn.Parameter(torch.zeros(2), requires_grad=False))], 0.1)
