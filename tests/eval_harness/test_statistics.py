"""Statistics against exhaustive counts, closed forms and simulation."""

import itertools
import math
import random

import numpy as np
import pytest

from eval_harness.statistics import paired_difference, pass_at_k, sign_test, standard_error, wilson_interval


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(5, 0, 1), (5, 2, 1), (6, 2, 3), (6, 5, 3), (7, 7, 7), (8, 1, 4)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(samples, correct, k):
    draws = list(itertools.combinations([index < correct for index in range(samples)], k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("bad", [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_impossible_pass_at_k_is_refused(bad):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*bad)


def test_standard_error_of_shares_and_of_one_row():
    values = [1.0] * 30 + [0.0] * 70
    assert standard_error(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert standard_error([1.0]) == 0.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 7), (850, 1319)])
def test_wilson_interval_solves_its_equation(successes, trials):
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        distance = abs(share - bound)
        assert distance == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)


def test_impossible_interval_is_refused():
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(3, 2)


def test_sign_test_by_counting():
    for better, worse in [(0, 0), (1, 0), (5, 1), (3, 3), (9, 2)]:
        trials = better + worse
        outcomes = [sum(flips) for flips in itertools.product([0, 1], repeat=trials)]
        extreme = [count for count in outcomes if abs(2 * count - trials) >= abs(better - worse)]
        assert sign_test(better, worse) == pytest.approx(len(extreme) / len(outcomes))


def test_paired_difference_sees_what_separate_intervals_hide():
    rng = random.Random(0)
    hard = [float(rng.random() < 0.5) for _ in range(400)]
    better = [1.0 if value == 0 and rng.random() < 0.08 else value for value in hard]
    paired = paired_difference(hard, better)
    assert paired.difference == pytest.approx(np.mean(better) - np.mean(hard))
    assert (paired.better, paired.worse, paired.rows) == (int(sum(better) - sum(hard)), 0, 400)
    assert 0 < paired.low < paired.difference < paired.high
    assert paired.p_value < 0.05
    first, second = wilson_interval(sum(hard), 400), wilson_interval(sum(better), 400)
    assert first[1] > second[0], "the separate intervals overlap"


def test_bootstrap_interval_is_the_normal_one_over_many_rows():
    differences = [1.0] * 300 + [-1.0] * 200 + [0.0] * 500
    paired = paired_difference([0.0] * 1000, differences)
    reach = 1.959964 * standard_error(differences)
    assert (0.1 - paired.low, paired.high - 0.1) == pytest.approx((reach, reach), rel=0.05)


def test_bootstrap_interval_covers_the_true_difference():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(40):
        first = (rng.random(200) < 0.5).astype(float)
        second = np.where(rng.random(200) < 0.2, 1 - first, first)
        paired = paired_difference(first, second, seed=trial)
        covered += paired.low <= 0 <= paired.high
    assert covered >= 33


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([1.0], [1.0, 0.0])
