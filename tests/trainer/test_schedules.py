import math

import pytest

from trainer.schedules import SCHEDULES, BatchPlan, LearningRateSchedule


def test_wsd_linear_is_its_closed_form():
    schedule = LearningRateSchedule("wsd_linear", total_tokens=1000, warmup_tokens=100, decay_tokens=200, floor=0.1)
    expected = {0: 0.0, 50: 0.5, 100: 1.0, 800: 1.0, 900: 0.55, 1000: 0.1, 1200: 0.1}
    assert {tokens: schedule.factor(tokens) for tokens in expected} == pytest.approx(expected)


def test_wsd_inverse_sqrt_is_its_closed_form():
    schedule = LearningRateSchedule("wsd_inverse_sqrt", 1000, warmup_tokens=0, decay_tokens=400, floor=0.1)
    for tokens in (600, 700, 850, 1000):
        assert schedule.factor(tokens) == pytest.approx((1 + 99 * (tokens - 600) / 400) ** -0.5)
    assert schedule.factor(599) == 1.0
    assert schedule.factor(1000) == pytest.approx(0.1)


def test_cosine_is_its_closed_form():
    schedule = LearningRateSchedule("cosine", 1000, warmup_tokens=200, floor=0.2)
    for tokens in (200, 333, 600, 1000):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * (tokens - 200) / 800)) / 2
        assert schedule.factor(tokens) == pytest.approx(expected)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_decay_without_length_decays_nothing(kind):
    schedule = LearningRateSchedule(kind, 1000, warmup_tokens=1000 if kind == "cosine" else 100)
    assert schedule.factor(1000) == 1.0


@pytest.mark.parametrize("kind", ["wsd_linear", "wsd_inverse_sqrt", "cosine"])
def test_a_decay_may_take_the_whole_run(kind):
    schedule = LearningRateSchedule(kind, 1000, warmup_tokens=0, decay_tokens=1000, floor=0.1)
    assert [schedule.factor(tokens) for tokens in (0, 1000)] == pytest.approx([1.0, 0.1])
    assert 0.1 < schedule.factor(1) < 1.0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "wsd"}, "wsd_linear"),
        ({"kind": "wsd_linear", "warmup_tokens": 900, "decay_tokens": 200}, "shorten"),
        ({"kind": "cosine", "floor": 1.5}, "1.5"),
        ({"kind": "wsd_inverse_sqrt", "floor": 0.0}, "wsd_linear"),
    ],
)
def test_wrong_schedules_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        LearningRateSchedule(total_tokens=1000, **values)


def test_batch_plan_ramps_the_batch_and_steps_the_length():
    plan = BatchPlan(1600, {0: 10, 5000: 40}, batch_tokens_end=8000, batch_ramp_tokens=10_000, rows_multiple=4)
    assert plan.shape(0) == (10, 160)
    assert plan.shape(4999) == (10, (1600 + int(6400 * 0.4999)) // 10 // 4 * 4)
    assert plan.shape(5000) == (40, 4800 // 40)
    assert plan.shape(10_000) == plan.shape(10**9) == (40, 200)


def test_batch_plan_without_ramp_is_constant():
    assert BatchPlan(2048, {0: 256}).shape(0) == BatchPlan(2048, {0: 256}).shape(10**12) == (256, 8)


def test_batch_plan_refuses_a_batch_below_a_row():
    with pytest.raises(ValueError, match="raise batch_tokens"):
        BatchPlan(1000, {0: 256, 100: 2048})
