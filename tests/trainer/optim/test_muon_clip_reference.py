"""The reference MuonClip against a float64 polynomial on singular values, torch's AdamW and hand-computed clips."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.optim.muon_clip_reference import (
    COEFFICIENTS,
    MuonClip,
    clip_scales,
    newton_schulz_reference,
)


def polynomial_of_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """What five Newton-Schulz steps do, computed another way: the odd polynomial applied to the singular values."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (values.square().sum().sqrt() + 1e-7)
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ vh


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12), (1, 7), (7, 1)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(
        newton_schulz_reference(matrix), polynomial_of_singular_values(matrix), rtol=0, atol=1e-10
    )


def test_two_steps_follow_the_written_update():
    weight = nn.Parameter(torch.randn(6, 10, dtype=torch.float64))
    start, gradients = weight.detach().clone(), torch.randn(2, 6, 10, dtype=torch.float64)
    optimizer = MuonClip([weight], lr=0.1, momentum=0.9, weight_decay=0.2)
    expected, momentum = start, torch.zeros_like(start)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        update = polynomial_of_singular_values(gradient + 0.9 * momentum)
        expected = (1 - 0.1 * 0.2) * expected - 0.1 * 0.2 * math.sqrt(10) * update
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-9)


def test_adamw_groups_equal_torch():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2))
    optimizer = MuonClip(
        [{"params": [ours], "algorithm": "adamw", "weight_decay": 0.3}], lr=1.0, adamw_lr=0.01, adamw_betas=(0.8, 0.9)
    )
    peer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.9), weight_decay=0.3, foreach=False)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(7, dtype=torch.float64)
        optimizer.step()
        peer.step()
    assert torch.equal(ours, theirs)


def test_clip_scales_by_hand():
    # one group: signal heads at 400, 100 and 50, noise head at 900; threshold 100
    logits = torch.tensor([400.0, 100.0, 50.0, 900.0])
    queries, keys = clip_scales(logits, 3, 100.0, "official")
    torch.testing.assert_close(queries, torch.tensor([0.5, 1.0, 1.0, 1 / 3]))
    torch.testing.assert_close(keys, torch.tensor([0.5, 1 / 3]))
    queries, keys = clip_scales(logits, 3, 100.0, "q_only")
    torch.testing.assert_close(queries, torch.tensor([0.25, 1.0, 1.0, 1 / 9]))
    torch.testing.assert_close(keys, torch.ones(2))
    queries, keys = clip_scales(logits, 3, 100.0, "compensated")
    torch.testing.assert_close(queries, torch.tensor([0.5, 2.0, 2.0, 1 / 3]))
    torch.testing.assert_close(keys, torch.tensor([0.5, 1 / 3]))


def test_groups_are_striped():
    # plain differential attention, two groups of a signal and a noise head; layers in front
    logits = torch.tensor([[400.0, 1.0, 1.0, 900.0], [1.0, 1.0, 1.0, 1.0]])
    queries, keys = clip_scales(logits, 1, 100.0, "official")
    torch.testing.assert_close(queries, torch.tensor([[0.5, 1.0, 1.0, 1 / 3], [1.0] * 4]))
    torch.testing.assert_close(keys, queries)


@pytest.mark.parametrize("logit", [-math.inf, -250.0, 100.0, math.nan, math.inf])
def test_no_clip_without_a_logit_above_the_threshold(logit):
    for rule in ("official", "q_only", "compensated"):
        for scale in clip_scales(torch.full((5,), logit), 4, 100.0, rule):
            assert torch.equal(scale, torch.ones_like(scale))


def fake_attention(logits: list[float], head_dim: int = 2, hidden: int = 6) -> SimpleNamespace:
    """What MuonClip reads of an attention module, for one group of signal heads and a noise head."""
    return SimpleNamespace(
        q_proj=nn.Linear(hidden, len(logits) * head_dim, bias=False),
        k_proj=nn.Linear(hidden, 2 * head_dim, bias=False),
        num_signal_heads_per_group=len(logits) - 1,
        head_dim=head_dim,
        max_logits=torch.tensor(logits),
    )


def test_step_clips_the_rows_of_hot_heads_and_reports():
    attention = fake_attention([400.0, 10.0, 20.0])
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    optimizer = MuonClip(weights, lr=1e-30, weight_decay=0.0, attentions=[attention])
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(weights[0].detach(), before[0] * torch.tensor([0.5] * 2 + [1.0] * 4)[:, None])
    torch.testing.assert_close(weights[1].detach(), before[1] * torch.tensor([0.5] * 2 + [1.0] * 2)[:, None])
    assert optimizer.clip_report() == {"clipped_heads": 1, "max_logit": 400.0, "skipped_steps": 0}
    assert attention.max_logits.tolist() == [-math.inf] * 3


def test_a_step_with_lr_zero_changes_no_weight():
    attention = fake_attention([400.0, 10.0])
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    optimizer = MuonClip(weights, lr=0.0, attentions=[attention])
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert optimizer.clip_report() == {"clipped_heads": 0, "max_logit": 400.0, "skipped_steps": 0}


@pytest.mark.parametrize("frozen", ["q_proj", "k_proj"])
def test_a_layer_with_a_weight_that_got_no_gradient_is_not_clipped(frozen):
    attention = fake_attention([400.0, 10.0])
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    optimizer = MuonClip(weights, lr=1e-30, weight_decay=0.0, attentions=[attention])
    getattr(attention, frozen).requires_grad_(False)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    assert all(map(torch.equal, weights, before))
    assert optimizer.clip_report()["clipped_heads"] == 0


def test_a_gate_raised_above_the_threshold_is_refused():
    attention = fake_attention([400.0, 10.0])
    optimizer = MuonClip([attention.q_proj.weight, attention.k_proj.weight], lr=0.1, attentions=[attention])
    attention.max_logits_gate = 200.0
    with pytest.raises(ValueError, match=r"max_logits_gate 200.0 is above qk_clip_threshold 100.0"):
        optimizer.step()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_everything(poison):
    attention = fake_attention([400.0, 10.0])
    bias = nn.Parameter(torch.ones(3))
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    groups = [{"params": weights}, {"params": [bias], "algorithm": "adamw"}]
    optimizer = MuonClip(groups, lr=0.1, attentions=[attention])
    for parameter in (*weights, bias):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parameters = [*weights, bias]
    before = [p.detach().clone() for p in parameters]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    bias.grad[1] = poison
    attention.max_logits.fill_(400.0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    for parameter, state in zip(parameters, states, strict=True):
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    assert optimizer.clip_report()["skipped_steps"] == 1
    resumed = MuonClip([{"params": weights}, {"params": [bias], "algorithm": "adamw"}], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.clip_report()["skipped_steps"] == 1
    assert attention.max_logits.max() == -math.inf


def test_zero_gradient_and_none_gradient():
    with_zero, with_none = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    with_zero.grad = torch.zeros(3, 4)
    MuonClip([with_zero, with_none], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(with_zero.detach(), torch.full((3, 4), 0.95))
    assert torch.equal(with_none, torch.ones(3, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_clip_threshold": 0.0}, "qk_clip_threshold is 0.0"),
        ({"qk_clip_threshold": math.nan}, "qk_clip_threshold is nan"),
        ({"qk_clip_rule": "half"}, "qk_clip_rule is 'half'"),
        ({"qk_clip_threshold": "100"}, "qk_clip_threshold is '100'"),
        ({"lr": -1.0}, "^lr is -1.0"),
        ({"lr": math.nan}, "^lr is nan"),
        ({"lr": torch.tensor(math.inf)}, "lr is tensor"),
        ({"lr": "1"}, "lr is '1'"),
        ({"momentum": 1.0}, "momentum is 1.0: give a number from 0 below 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"adamw_lr": -2.0}, "adamw_lr is -2.0"),
        ({"adamw_lr": math.nan}, "adamw_lr is nan"),
        ({"adamw_eps": -1e-8}, "eps is -1e-08"),
        ({"adamw_betas": (1.0, 2.0)}, "one of betas is 1.0"),
        ({"adamw_betas": (0.9,)}, "give two numbers"),
        ({"attentions": [fake_attention([1.0, 1.0])]}, "not optimised"),
    ],
)
def test_bad_settings_raise(options, message):
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))]},
        {"params": [nn.Parameter(torch.ones(2))], "algorithm": "adamw"},
    ]
    with pytest.raises(ValueError, match=message):
        MuonClip(groups, **{"lr": 0.1} | options)


def test_without_a_threshold_nothing_is_clipped():
    attention = fake_attention([400.0, 10.0])
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    optimizer = MuonClip(weights, lr=1e-30, weight_decay=0.0, qk_clip_threshold=None, attentions=[attention])
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(map(torch.equal, weights, before))


def test_bad_groups_raise():
    with pytest.raises(ValueError, match="algorithm is 'sgd'"):
        MuonClip([{"params": [nn.Parameter(torch.ones(2, 2))], "algorithm": "sgd"}], lr=0.1)
    with pytest.raises(ValueError, match="no matrix"):
        MuonClip([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"lr is -3.0"):
        MuonClip([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": -3.0}], lr=0.1)


def test_a_group_that_is_refused_is_not_kept():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = MuonClip([weight], lr=0.1)
    for group in ({"params": [nn.Parameter(torch.ones(3))]}, {"params": nn.Parameter(torch.ones(3, 3)), "lr": -1.0}):
        with pytest.raises(ValueError, match=r"no matrix|lr is -1.0"):
            optimizer.add_param_group(group)
    for parameter in [weight, *(p for group in optimizer.param_groups for p in group["params"])]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
