"""A continuation takes the newest whole checkpoint, names the others, applies new rates and refuses other settings."""

import json
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sft.callbacks import read_metrics
from sft.checkpoints import claim_output_dir, newest_complete, seal
from sft.stage import run_stage
from trainer.errors import CheckpointError


@pytest.fixture(scope="module")
def finished(workplace, tmp_path_factory):
    """The folder of a run of 4 updates with checkpoints after 2 and 4, and its settings."""
    from sft.config import SftStageConfig

    config = SftStageConfig(
        model_name_or_path=str(workplace / "base"),
        output_dir=str(tmp_path_factory.mktemp("whole") / "run"),
        train_files=[str(workplace / "train.jsonl")],
        max_length=256,
        learning_rate=5e-3,
        max_steps=4,
        kernels="torch",
        dtype="float32",
        gradient_checkpointing=False,
        use_cpu=True,
        preview_samples=0,
        progress=False,
        save_steps=2,
    )
    run_stage(config)
    return config


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of that run from before its model was written."""
    shutil.copytree(finished.output_dir, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    return replace(finished, output_dir=str(tmp_path / "run"), resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda newest: [file.unlink() for file in newest.iterdir()], "no complete.json, its writing was cut short"),
        (lambda newest: (newest / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda newest: (newest / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda newest: cut(newest / "model.safetensors"), r"model.safetensors has \d+ bytes instead of \d+"),
        (lambda newest: cut(newest / "complete.json"), "complete.json cannot be read"),
    ],
    ids=["empty", "no moments", "no state", "cut weights", "cut list"],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(interrupted, spoil, reason):
    checkpoints = Path(interrupted.output_dir) / "checkpoints"
    spoil(checkpoints / "checkpoint-4")
    newest, (line,) = newest_complete(checkpoints)
    assert newest == checkpoints / "checkpoint-2"
    assert re.match(f"checkpoint-4: {reason}", line)
    shutil.rmtree(checkpoints / "checkpoint-2")
    with pytest.raises(ValueError, match=r"holds no complete checkpoint \(checkpoint-4: .* to start anew"):
        claim_output_dir(interrupted.output_dir, resume=True)


def test_a_spoilt_run_goes_on_to_the_same_weights(finished, interrupted, capsys):
    """The newest checkpoint lost its moments, and the record its last line's end."""
    folder = Path(interrupted.output_dir)
    (folder / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()
    cut(folder / "metrics.jsonl")
    run_stage(interrupted)
    shown = capsys.readouterr().out
    assert f"goes on from {folder / 'checkpoints' / 'checkpoint-2'}" in shown
    assert "passed over checkpoint-4: optimizer.pt is missing" in shown
    old, new = (
        {line["step"]: line["loss"] for line in read_metrics(Path(run.output_dir) / "metrics.jsonl")}
        for run in (finished, interrupted)
    )
    assert [new[3], new[4]] == [old[3], old[4]]
    first, second = (
        AutoModelForCausalLM.from_pretrained(Path(run.output_dir) / "model").state_dict()
        for run in (finished, interrupted)
    )
    assert all(torch.equal(value, first[name]) for name, value in second.items())


def test_a_cut_last_line_is_dropped_and_another_one_is_named(tmp_path):
    record = tmp_path / "metrics.jsonl"
    record.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(record) == [{"step": 1}, {"step": 2}]
    record.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is no JSON"):
        read_metrics(record)


def test_a_lower_rate_counts_from_the_checkpoint_on(finished, interrupted, capsys):
    shutil.rmtree(Path(interrupted.output_dir) / "checkpoints" / "checkpoint-4")
    run_stage(replace(interrupted, learning_rate=1e-3, weight_decay=0.0))
    shown = capsys.readouterr().out
    assert "learning_rate is 0.001 and was 0.005" in shown
    assert "weight_decay is 0.0 and was 0.1" in shown
    old, new = (
        {line["step"]: line["learning_rate"] for line in read_metrics(Path(run.output_dir) / "metrics.jsonl")}
        for run in (finished, interrupted)
    )
    assert new[2] == old[2]
    assert new[3] == pytest.approx(old[3] / 5)
    assert new[4] == pytest.approx(old[4] / 5)
    state = torch.load(Path(interrupted.output_dir) / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0}
    assert yaml.safe_load((Path(interrupted.output_dir) / "config.yaml").read_text())["learning_rate"] == 1e-3


def test_settings_and_data_that_the_past_depends_on_must_stay(interrupted):
    other = replace(interrupted, seed=9, max_length=200, learning_rate=1e-3)
    with pytest.raises(
        ValueError, match=r"max_length is 200 and was 256; seed is 9 and was 0: set them back"
    ) as error:
        run_stage(other)
    assert "learning_rate is" not in str(error.value)
    report = Path(interrupted.output_dir) / "data_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"tokens": 7}))
    with pytest.raises(ValueError, match=r"the training data is not the run's: tokens is \d+ and was 7; put"):
        run_stage(interrupted)


def test_the_same_rows_in_another_order_are_other_data(interrupted, tmp_path):
    """By their number, the rows that were trained on would be others."""
    lines = Path(interrupted.train_files[0]).read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(reversed(lines)))
    recipe = Path(interrupted.output_dir) / "config.yaml"
    files = [str(tmp_path / "train.jsonl")]
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"train_files": files}))
    with pytest.raises(ValueError, match=r"the training data is not the run's: digest is \w+ and was \w+; put"):
        run_stage(replace(interrupted, train_files=files))


def test_without_a_checkpoint_nobody_is_sent_to_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="it left no checkpoint; choose another folder, or remove this one"):
        claim_output_dir(tmp_path, resume=False)


def test_a_seal_lists_every_file_below(tmp_path):
    """Shards lie in folders of their own."""
    (tmp_path / "checkpoint-3" / "shards").mkdir(parents=True)
    (tmp_path / "checkpoint-3" / "shards" / "part").write_bytes(b"123")
    (tmp_path / "checkpoint-3" / "complete.json.partial").write_text("{")  # a full disk cut this list short
    seal(tmp_path / "checkpoint-3")
    assert json.loads((tmp_path / "checkpoint-3" / "complete.json").read_text()) == {"shards/part": 3}
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-3", [])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=rf"output_dir '{folder}' cannot be made: .*; choose another folder"):
            claim_output_dir(folder, resume=False)


@pytest.fixture
def full_disk():
    """No file may grow beyond 30,000 bytes while this is entered."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full:
        def __enter__(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

        def __exit__(self, *error):
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield Full()
    signal.signal(signal.SIGXFSZ, before)


def test_a_model_that_does_not_fit_on_the_disk_is_no_finished_run(interrupted, full_disk, monkeypatch):
    from sft import stage

    save = stage.save_final_model

    def save_on_a_full_disk(*args):
        with full_disk:
            return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_final_model", save_on_a_full_disk)
        with pytest.raises(CheckpointError, match=r"the model could not be written to .* with resume: true"):
            run_stage(interrupted)
    assert not (Path(interrupted.output_dir) / "model").exists()
    result = run_stage(interrupted)
    assert AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert not (Path(interrupted.output_dir) / "model.partial").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(interrupted, full_disk, monkeypatch):
    from sft import stage

    checkpoints = Path(interrupted.output_dir) / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-4")
    write = stage.SFTTrainer._save_checkpoint

    def write_on_a_full_disk(*args):
        with full_disk:
            return write(*args)

    monkeypatch.setattr(stage.SFTTrainer, "_save_checkpoint", write_on_a_full_disk)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written .* make room"):
        run_stage(interrupted)
    newest, (passed_over,) = newest_complete(checkpoints)
    assert newest.name == "checkpoint-2"
    assert passed_over.startswith("checkpoint-4: no complete.json")
