import numpy as np
import pytest

from trainer.data.curriculum import DomainAllocator, DomainShare, Mixture, check_reasoning

SHARES = {"web": DomainShare(0.8, 0.4, 0.2), "code": DomainShare(0.15, 0.35), "math": DomainShare(0.05, 0.25, 0.45)}


def test_weights_follow_the_closed_form_in_both_phases():
    mixture = Mixture(SHARES, main_tokens=1000, annealing_tokens=100)
    for tokens in (0, 250, 999.5):
        expected = {name: s.start + (s.end - s.start) * tokens / 1000 for name, s in SHARES.items()}
        assert mixture.weights(tokens) == pytest.approx(expected)
    assert mixture.weights(1050) == pytest.approx({"web": 0.3, "code": 0.35, "math": 0.35})
    assert mixture.weights(5000) == pytest.approx({"web": 0.2, "code": 0.35, "math": 0.45})


def test_realised_shares_follow_the_schedule_within_a_thousandth():
    rows, length, steps = 8, 256, 3000
    mixture = Mixture(SHARES, main_tokens=rows * length * steps)
    allocator, rng = DomainAllocator(SHARES), np.random.default_rng(0)
    scheduled, realised = np.zeros((steps, 3)), np.zeros((steps, 3))
    for step in range(steps):
        weights = mixture.weights(step * rows * length)
        for _ in range(rows):
            tokens = int(rng.integers(250, length + 1))
            domain = allocator.choose(weights, length)
            allocator.record(weights, domain, tokens)
            scheduled[step] += np.array(list(weights.values())) * tokens
            realised[step, list(SHARES).index(domain)] += tokens
    gap = np.concatenate([np.zeros((1, 3)), np.cumsum(realised - scheduled, axis=0)])
    tokens = np.concatenate([[0], np.cumsum(scheduled.sum(1))])
    windows = np.abs(gap[1000:] - gap[:-1000]).max(1) / (tokens[1000:] - tokens[:-1000])
    assert len(windows) == steps - 999
    assert windows.max() < 1e-3


def test_a_domain_without_weight_gets_no_row():
    allocator = DomainAllocator(["a", "b"])
    allocator.deficit_tokens = {"a": 0.0, "b": 1e9}
    assert allocator.choose({"a": 1.0, "b": 0.0}, 256) == "a"


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ({"a": DomainShare(0.5, 0.5), "b": DomainShare(0.6, 0.5)}, "start shares"),
        ({"a": DomainShare(1.5, 0.5), "b": DomainShare(-0.5, 0.5)}, "'b'"),
        ({}, "no domain"),
    ],
)
def test_wrong_mixtures_are_refused(shares, named):
    with pytest.raises(ValueError, match=named):
        Mixture(shares, 100)


def test_reasoning_is_capped_and_led_by_math():
    shares = {
        "web": DomainShare(0.9, 0.9, 0.9),
        "reasoning_math": DomainShare(0.06, 0.06, 0.07),
        "reasoning_code": DomainShare(0.04, 0.04, 0.03),
    }
    names = ["reasoning_math", "reasoning_code"]
    check_reasoning(shares, names, cap=0.1)
    with pytest.raises(ValueError, match="reasoning_cap"):
        check_reasoning(shares, names, cap=0.09)
    swapped = shares | {
        "reasoning_math": DomainShare(0.04, 0.04, 0.03),
        "reasoning_code": DomainShare(0.06, 0.06, 0.07),
    }
    with pytest.raises(ValueError, match="math must outweigh code"):
        check_reasoning(swapped, names, cap=0.1)
    late = shares | {
        "reasoning_math": DomainShare(0.05, 0.02, 0.06),
        "reasoning_code": DomainShare(0.05, 0.08, 0.04),
    }
    with pytest.raises(ValueError, match=r"begins annealing with math at 0.02 and code at 0.08"):
        check_reasoning(late, names, cap=0.1)
    with pytest.raises(ValueError, match="not among"):
        check_reasoning(shares, ["reasoning"], cap=0.1)
