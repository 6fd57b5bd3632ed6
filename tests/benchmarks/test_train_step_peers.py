"""What transformers' Trainer does in a step that is timed beside ours: all of the step's rows, every time."""

from dataclasses import replace

import pytest

from benchmarks import train_step_peers
from benchmarks.train_step_cases import TINY


def test_every_step_has_all_its_rows(monkeypatch):
    parts, ends = [], []

    class Counting(train_step_peers.Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            parts.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(train_step_peers.StepClock):
        def on_step_end(self, *args, **kwargs):
            ends.append(len(parts))
            super().on_step_end(*args, **kwargs)

    monkeypatch.setattr(train_step_peers, "Trainer", Counting)
    monkeypatch.setattr(train_step_peers, "StepClock", Clock)
    timing = train_step_peers.trainer_run(replace(TINY, layers=1, length=8, rows=10), "Llama", 3, 5)
    assert set(parts) == {2}
    assert ends == [5, 10, 15, 20, 25, 30, 35, 40]
    assert len(timing.seconds) == 5
    assert timing.tokens == 80


def test_rows_that_leave_a_rest_are_refused():
    with pytest.raises(ValueError, match="10 rows a step, 4 at once"):
        train_step_peers.trainer_run(replace(TINY, rows=10, micro_rows=4), "Llama", 1, 1)
