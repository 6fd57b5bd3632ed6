"""What a run tells: norms of the maps when asked, warnings by name, trackers, one line a step."""

import json
import warnings

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_motif2.diagnostics import attention_modules, record_attention
from tests.distributed import run_distributed
from tests.trainer.test_loop import curve, read_metrics
from trainer.assemble import make_accelerator
from trainer.config import PretrainConfig
from trainer.failure_signs import FailureWarning, NoiseHeadsGrowingWarning
from trainer.loop import run_pretraining
from trainer.metrics import step_line
from trainer.step import TrainStep

NORMS = ("signal_norms", "noise_norms", "noise_shares")


def test_norms_are_those_of_the_forward_and_cost_nothing_between(make_config, tmp_path, monkeypatch):
    expected, tracked = {}, []
    original = TrainStep.run

    def run(self, batch, factor):
        tracked.append([module.output_norms is not None for module in attention_modules(self.model)])
        with record_attention(self.model) as statistics, torch.no_grad():
            self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        expected[len(tracked)] = statistics
        return original(self, batch, factor)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "run", run)
        result = run_pretraining(make_config(norm_steps=3))
    assert tracked == [[step % 3 == 0] * 2 for step in range(1, 9)]
    for entry in read_metrics(result.metrics_path)[0]:
        assert all((name in entry) == (entry["step"] % 3 == 0) for name in NORMS)
        for layer, wanted in enumerate(expected[entry["step"]]) if "noise_norms" in entry else ():
            assert entry["signal_norms"][layer] == pytest.approx(float(wanted.signal_norms.mean()), rel=1e-5)
            assert entry["noise_norms"][layer] == pytest.approx(float(wanted.noise_norms.mean()), rel=1e-5)
            assert entry["noise_shares"][layer] == pytest.approx(wanted.noise_share, rel=1e-5)
    never = make_config(output_dir=str(tmp_path / "never"), norm_steps=0)
    run_pretraining(never)
    assert curve(tmp_path / "run") == curve(never.output_dir)  # measuring leaves no trace


@pytest.mark.distributed
def test_ranks_measure_the_norms_together(make_config, tmp_path):
    settings = {"norm_steps": 1, "eval_steps": 0, "total_tokens": 128 * 5}
    alone = run_pretraining(make_config(output_dir=str(tmp_path / "alone"), **settings))
    config = make_config(output_dir=str(tmp_path / "together"), **settings)
    run_distributed(lambda rank: run_pretraining(config).steps, 2)
    for one, other in zip(
        *(read_metrics(tmp_path / n / "metrics.jsonl")[0] for n in ("alone", "together")), strict=True
    ):
        for name in NORMS:
            assert other[name] == pytest.approx(one[name], rel=1e-3)
    assert alone.steps == 5


def test_a_sign_is_warned_of_and_recorded(make_config):
    config = make_config(norm_steps=2, warn_noise_share=1e-6, eval_steps=0)
    with pytest.warns(NoiseHeadsGrowingWarning, match="step 2: noise heads are growing"):
        result = run_pretraining(config)
    named = {entry["step"]: entry.get("warnings") for entry in read_metrics(result.metrics_path)[0]}
    assert named[2] == ["NoiseHeadsGrowingWarning"]
    assert not any(names for step, names in named.items() if step != 2)


def test_a_sound_run_raises_no_warning(make_config):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FailureWarning)
        result = run_pretraining(make_config(norm_steps=1))
    assert not any(entry.get("warnings") for entry in read_metrics(result.metrics_path)[0])


def test_tensorboard_is_the_default_and_gets_every_measurement(make_config, tmp_path):
    trackers = PretrainConfig.__dataclass_fields__["trackers"].default_factory()
    assert trackers == ["tensorboard"]
    run_pretraining(make_config(trackers=trackers, norm_steps=4, log_steps=2, peak_tflops=1.0))
    events = EventAccumulator(str(next((tmp_path / "run/pretrain").glob("events*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    wanted = "loss_by_domain/a learning_rate mixture/b realised/a tokens tokens_per_second mfu grad_norm max_logits/1 "
    wanted += "clipped_heads lambdas/0 signal_norms/0 noise_norms/1 noise_shares/0 skipped_steps data_wait_share "
    wanted += "padding_share lost_share eval/a"
    assert set(wanted.split()) <= set(events.Tags()["scalars"])
    recorded = read_metrics(tmp_path / "run/metrics.jsonl")[0]
    assert events.Scalars("loss")[0].value == pytest.approx(recorded[1]["loss"], rel=1e-6)


def test_a_tracker_that_is_missing_is_named(make_config, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed: pip install wandb"):
        make_accelerator(make_config(trackers=["wandb"]))
    with pytest.raises(ValueError, match="'all' is not installed: name each"):
        make_accelerator(make_config(trackers=["all"]))


def test_a_step_is_one_line():
    entry = json.loads(
        '{"step": 12, "tokens": 1536, "loss": 3.25, "loss_by_domain": {"a": 3.0, "b": 3.5}, "learning_rate": 0.001, '
        '"mixture": {"a": 0.7, "b": 0.3}, "realised": {"a": 0.68, "b": 0.32}, "skipped_steps": 2, '
        '"grad_norm": 0.5, "max_logits": [1.0, 42.0], "clipped_heads": 3, '
        '"max_logits_exact": true, "tokens_per_second": 1000.0, "mfu": 0.5, "data_wait_share": 0.002, '
        '"peak_memory_bytes": 1073741824, '
        '"lambdas": [0.5, 0.2], "signal_norms": [1.5, 2.5], "noise_norms": [0.5, 0.25], '
        '"noise_shares": [0.2, 0.4], "skipped": true}'
    )
    line = step_line(entry)
    assert "\n" not in line
    for part in (
        "step      12",
        "tokens 1536",
        "loss 3.2500 (a 3.000 b 3.500)",
        "realised 68/32",
        "logit 42.0",
        "clipped 3",
    ):
        assert part in line
    for part in ("MFU 50.0%", "data wait 0.2%", "memory 1.00 GiB", "SKIPPED", "skipped 2", "lambda 0.20..0.50"):
        assert part in line
    assert "signal 1.5..2.5  noise 0.25..0.5 (share 0.40)" in line
    assert "logit <=42.0" in step_line({**entry, "max_logits_exact": False})
    assert "logit" not in step_line({**entry, "max_logits": []})  # nothing is tracked


def test_maximum_logits_are_exact_in_some_steps_and_bounds_in_the_others(make_config, tmp_path):
    settings = {"eval_steps": 0, "checkpoint_steps": 0, "total_tokens": 128 * 7}
    exact = make_config(output_dir=str(tmp_path / "exact"), exact_logit_steps=1, **settings)
    gated = make_config(output_dir=str(tmp_path / "gated"), exact_logit_steps=3, **settings)
    truth, found = (read_metrics(run_pretraining(config).metrics_path)[0] for config in (exact, gated))
    assert [entry["max_logits_exact"] for entry in found] == [True, False, False, True, False, False, True]
    for true, entry in zip(truth, found, strict=True):
        assert entry["loss"] == true["loss"]
        if entry["max_logits_exact"]:
            assert entry["max_logits"] == true["max_logits"]
        else:
            pairs = zip(true["max_logits"], entry["max_logits"], strict=True)
            assert all(largest < bound < gated.qk_clip_threshold for largest, bound in pairs)
