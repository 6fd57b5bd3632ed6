"""Who may write into a run's folder: a new run, or the same one again; nothing of another's is touched."""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from trainer.checkpoint_files import complete_checkpoints
from trainer.run_folder import open_run_folder

ALONE = SimpleNamespace(is_main_process=True, main_process_first=contextlib.nullcontext)


@pytest.fixture
def interrupted(trained_run, tmp_path):
    """Folder of a run that has checkpoints and no final model."""
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    return tmp_path / "run"


def test_settings_that_were_being_written_when_the_run_was_killed_are_still_there(
    make_config, interrupted, monkeypatch
):
    config = make_config(eval_steps=0)
    original = Path.write_text

    def killed(self, text, *args, **kwargs):
        if self.name.startswith("config.yaml"):
            original(self, text[: len(text) // 2], *args, **kwargs)
            raise KeyboardInterrupt
        return original(self, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run_folder(config, ALONE)
    open_run_folder(config, ALONE)
    assert yaml.safe_load((interrupted / "config.yaml").read_text()) == config.to_dict()


@pytest.mark.parametrize("content", ["", "output_dir: [", "tokenizer: mine\n", None], ids=str)
def test_checkpoints_without_their_settings_are_refused_and_kept(make_config, interrupted, content):
    (interrupted / "config.yaml").unlink()
    if content is not None:
        (interrupted / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"holds checkpoints and metrics.jsonl.*config.yaml is not the settings"):
        open_run_folder(make_config(eval_steps=0), ALONE)
    assert len(complete_checkpoints(interrupted / "checkpoints")) == 2
    open_run_folder(make_config(eval_steps=0, overwrite=True), ALONE)
    assert not complete_checkpoints(interrupted / "checkpoints")


def test_another_programs_folder_is_left_alone(make_config, tmp_path, trained_run):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("somebody: else\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"holds metrics.jsonl and config.yaml, but .* choose another output_dir"):
        open_run_folder(make_config(), ALONE)
    assert (folder / "config.yaml").read_text() == "somebody: else\n"
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    for inside in ("model", "checkpoints/step_00000004"):
        with pytest.raises(ValueError, match="is itself a model or a checkpoint"):
            open_run_folder(make_config(output_dir=str(trained_run / inside)), ALONE)
    with pytest.raises(ValueError, match=r"holds the checkpoints of a run: give .* to go on with it"):
        open_run_folder(make_config(output_dir=str(trained_run / "checkpoints")), ALONE)
    shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True)  # of whoever launched it
    open_run_folder(make_config(), ALONE)


def test_overwrite_does_not_delete_the_progress_of_the_same_command(make_config, interrupted):
    open_run_folder(make_config(eval_steps=0, overwrite=True), ALONE)
    assert len(complete_checkpoints(interrupted / "checkpoints")) == 2
    open_run_folder(make_config(eval_steps=0, overwrite=True, seed=1), ALONE)
    assert not complete_checkpoints(interrupted / "checkpoints")


def test_overwrite_deletes_the_curves_of_the_run_that_it_deletes(make_config, interrupted):
    events = interrupted / "pretrain" / "events.out.tfevents.1.host.1.0"
    events.parent.mkdir()
    for file in (events, events.with_name("notes.txt")):
        file.write_text("of the run before")
    open_run_folder(make_config(eval_steps=0, overwrite=True), ALONE)
    assert events.exists(), "the same run goes on"
    open_run_folder(make_config(eval_steps=0, overwrite=True, seed=1), ALONE)
    assert [file.name for file in events.parent.iterdir()] == ["notes.txt"]


def test_how_often_checkpoints_are_taken_may_change_unless_they_are_averaged(make_config, interrupted):
    open_run_folder(make_config(eval_steps=0, checkpoint_steps=2, keep_last=3), ALONE)
    averaging = {"eval_steps": 0, "average_every_tokens": 512, "average_checkpoints": 2}
    settings = make_config(checkpoint_steps=4, **averaging).to_dict()
    (interrupted / "config.yaml").write_text(yaml.safe_dump(settings))
    open_run_folder(make_config(checkpoint_steps=4, **averaging), ALONE)
    with pytest.raises(ValueError, match=r"checkpoint_steps 4 -> 2, keep_last 2 -> 3"):
        open_run_folder(make_config(checkpoint_steps=2, keep_last=3, **averaging), ALONE)
