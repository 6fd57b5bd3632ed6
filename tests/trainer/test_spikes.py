"""A loss spike is found, the run goes back, leaves the batches out, and restarts bit for bit; too many stop it."""

import json
import random
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.trainer.test_loop import Killed, curve, kill_at, read_metrics
from trainer.checkpoint_files import complete_checkpoints
from trainer.errors import LossSpikeError
from trainer.failure_signs import LossSpikeWarning
from trainer.loop import run_pretraining
from trainer.spikes import SpikeDetector
from trainer.step import TrainStep

SPIKY = {"spike_window_steps": 3, "spike_patience_steps": 1, "spike_min_rise": 5.0, "eval_steps": 0}


def observe(detector: SpikeDetector, losses) -> list[bool]:
    return [detector.observe(loss) for loss in losses]


def test_limit_is_median_plus_scaled_deviation():
    detector = SpikeDetector(5, deviations=4, min_rise=0.1, patience_steps=1)
    assert detector.limit is None
    assert not any(observe(detector, [1.0, 1.2, 0.9, 1.1, 9.0]))  # an outlier in the window moves neither
    assert detector.limit == pytest.approx(1.1 + 4 * 1.4826 * 0.1)
    assert SpikeDetector(0, 4, 0.1, 1).limit is None
    quiet = SpikeDetector(4, deviations=4, min_rise=0.1, patience_steps=1)
    observe(quiet, [2.0] * 4)
    assert quiet.limit == pytest.approx(2.1)


def test_a_spike_takes_patience_and_leaves_the_window_alone():
    detector = SpikeDetector(4, deviations=10, min_rise=0.5, patience_steps=3)
    observe(detector, [3.0, 3.1, 2.9, 3.0])
    assert observe(detector, [9, 9, 3, 9, 9]) == [False] * 5
    assert observe(detector, [9]) == [True]
    assert max(detector.recent) < 4


def test_noisy_falling_losses_are_no_spikes():
    rng = random.Random(0)
    losses = [2 + 6 / (1 + step / 100) + rng.gauss(0, 0.2) for step in range(5000)]
    assert not any(observe(SpikeDetector(128, 10.0, 0.5, 3), losses))


def test_state_continues():
    detector, other = (SpikeDetector(4, 10, 0.5, 2) for _ in range(2))
    observe(detector, [1, 2, 1, 2, 99])
    other.load_state_dict(detector.state_dict())
    assert other.observe(99)
    assert other.limit == detector.limit


def spoil(monkeypatch, marks: list[int]) -> list:
    """Add 50 to the loss of the batches that come `marks`-th in the data; returns the first tokens of those seen."""
    original = TrainStep.run
    first_batches: dict[tuple, int] = {}
    seen = []

    def run(self, batch, factor):
        key = tuple(
            sorted(
                (name, state["next_document"], len(state["row_sizes"]))
                for name, state in batch.state["streams"].items()
            )
        )
        number = first_batches.setdefault(key, len(first_batches) + 1)
        seen.append(number)
        outcome = original(self, batch, factor)
        if number in marks:
            outcome.loss += 50
        return outcome

    monkeypatch.setattr(TrainStep, "run", run)
    return seen


def test_a_spike_rewinds_and_skips_the_batches(make_config, monkeypatch):
    seen = spoil(monkeypatch, [7])
    config = make_config(**SPIKY)
    with pytest.warns(LossSpikeWarning, match="step 7: the loss spiked to 5"):
        result = run_pretraining(config)
    assert (result.steps, result.tokens) == (8, 128 * 8)
    assert seen == [*range(1, 8), *range(8, 12)]  # steps 1 to 7, then 5 to 8 on batches never seen before
    steps, _ = read_metrics(result.metrics_path)
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    (rewind,) = steps[4]["rewinds"]
    assert (rewind["from_step"], rewind["to_step"]) == (7, 4)
    assert rewind["loss"] > 50 > rewind["limit"]
    assert steps[4]["warnings"] == ["LossSpikeWarning"]
    assert [entry["tokens"] for entry in steps] == [128 * step for step in range(1, 9)]
    assert steps[4]["mixture"]["a"] == pytest.approx(0.75 - 0.5 * 4 / 8)
    assert not any("rewinds" in entry for entry in steps[5:])


@pytest.mark.slow
def test_a_run_killed_after_a_rewind_continues_bit_for_bit(make_config, tmp_path, monkeypatch):
    whole, cut = (make_config(output_dir=str(tmp_path / name), **SPIKY) for name in ("whole", "cut"))
    with monkeypatch.context() as patch:
        spoil(patch, [7])
        run_pretraining(whole)
        with patch.context() as killer:
            kill_at(killer, 9)  # the second step after the rewind
            with pytest.raises(Killed):
                run_pretraining(cut)
        assert [path.name for path in complete_checkpoints(tmp_path / "cut/checkpoints")] == ["step_00000004"]
        run_pretraining(cut)
    assert curve(cut.output_dir) == curve(whole.output_dir)
    rewinds = [
        [entry.get("rewinds") for entry in read_metrics(Path(c.output_dir) / "metrics.jsonl")[0]] for c in (whole, cut)
    ]
    assert rewinds[0] == rewinds[1]


def test_too_many_spikes_stop_the_run(make_config, monkeypatch):
    spoil(monkeypatch, list(range(6, 100)))
    config = make_config(max_rewinds=2, **SPIKY)
    with pytest.warns(LossSpikeWarning), pytest.raises(LossSpikeError, match=r"max_rewinds 2.*step_00000004.*lower"):
        run_pretraining(config)


@pytest.mark.slow
def test_a_limit_below_the_rewinds_so_far_stops_the_run_too(make_config, monkeypatch):
    spoil(monkeypatch, [5, 8])
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.warns(LossSpikeWarning, match="step 5"), pytest.raises(Killed):
            run_pretraining(make_config(checkpoint_steps=1, **SPIKY))
    with pytest.warns(LossSpikeWarning, match="step 7"), pytest.raises(LossSpikeError, match="max_rewinds 0"):
        run_pretraining(make_config(checkpoint_steps=1, max_rewinds=0, **SPIKY))


def test_without_a_checkpoint_the_run_goes_on(make_config, monkeypatch, capsys):
    spoil(monkeypatch, [4])
    with pytest.warns(LossSpikeWarning, match="step 4"):
        assert run_pretraining(make_config(checkpoint_steps=0, **SPIKY)).steps == 8
    assert "no checkpoint to go back to" in capsys.readouterr().out


def test_no_checkpoint_is_taken_while_the_loss_is_high(make_config, monkeypatch, tmp_path):
    spoil(monkeypatch, [4])
    config = make_config(**{**SPIKY, "spike_patience_steps": 2})
    run_pretraining(config)
    names = [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["step_00000005", "step_00000008"]


@pytest.mark.distributed
def test_all_ranks_rewind_alike(make_config, tmp_path, monkeypatch):
    spoil(monkeypatch, [7])
    config = make_config(output_dir=str(tmp_path / "two"), **SPIKY)

    def main(rank):
        result = run_pretraining(config)
        return result.steps, torch.load(tmp_path / "two/checkpoints/step_00000008/trainer_state.pt")["rewinds"]

    results = run_distributed(main, 2)
    assert results[0] == results[1]
    assert results[0][1][0]["to_step"] == 4
    alone = make_config(output_dir=str(tmp_path / "one"), **SPIKY)
    with pytest.warns(LossSpikeWarning):
        run_pretraining(alone)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
