import json
import os
import random
import shutil
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.filesystem import FileSystem

from tests.trainer.test_sharded_checkpoint import build, train, weights
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import (
    checkpoint_step,
    complete_checkpoints,
    prune,
    remove_checkpoint,
    remove_unfinished,
    verify_checkpoint,
    write_synced,
)
from trainer.errors import CheckpointError
from trainer.failure_signs import CheckpointWarning
from trainer.loop import run_pretraining


@pytest.fixture
def finished(trained_run, make_config, tmp_path):
    """Folder of checkpoints of a run of 8 steps, at 4 and 8, that lacks its model; and its configuration."""
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    return tmp_path / "run/checkpoints", make_config(eval_steps=0)


def test_only_the_last_ones_are_kept_and_the_end_is_one(make_config):
    config = make_config(checkpoint_steps=3, keep_last=2, eval_steps=0)
    run_pretraining(config)
    names = [path.name for path in complete_checkpoints(Path(config.output_dir) / "checkpoints")]
    assert names == ["step_00000006", "step_00000008"]


@pytest.mark.parametrize("pattern", ["*.distcp", "trainer_state.pt", "random_0.pt", ".metadata"])
def test_a_corrupted_file_is_found_and_named(finished, pattern):
    folder, config = finished
    file = next((folder / "step_00000008").glob(pattern))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is corrupted"):
        run_pretraining(config)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is lost"):
        verify_checkpoint(folder / "step_00000008")


def test_an_unfinished_checkpoint_is_not_used(finished):
    folder, config = finished
    (folder / "step_00000008").rename(folder / "step_00000008.tmp")
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000004"]
    assert run_pretraining(config).steps == 8


def test_a_model_of_another_shape_is_refused(finished, make_config):
    folder, _ = finished
    recipe = folder.parent / "config.yaml"
    recipe.write_text(recipe.read_text().replace("intermediate_size: 64", "intermediate_size: 80"))
    with pytest.raises(ValueError, match=r"mlp.*weight is \(.*64.* there and \(.*80"):
        run_pretraining(make_config(eval_steps=0, intermediate_size=80))
    assert len(complete_checkpoints(folder)) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("file", ["trainer_state.pt", "__0_0.distcp"])
def test_a_full_disk_keeps_the_last_good_one_and_the_run_says_so(finished, monkeypatch, asynchronous, file):
    folder, config = finished
    config.async_checkpoints = asynchronous
    shutil.rmtree(folder / "step_00000008")
    with monkeypatch.context() as patch:
        fill_disk(patch, file)
        with pytest.raises(CheckpointError, match=r"No space left on device.*step_00000004: free the disk"):
            run_pretraining(config)
    assert [path.name for path in folder.iterdir()] == ["step_00000004"]
    assert run_pretraining(config).steps == 8


def fill_disk(patch, file: str) -> None:
    """Let no byte of `file` reach the disk."""

    def after_checking(original, position):
        def write(*args, **kwargs):
            if f".tmp/{file}" in str(args[position]):
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return write

    patch.setattr("trainer.checkpoint.write_synced", after_checking(write_synced, 0))
    patch.setattr(FileSystem, "create_stream", after_checking(FileSystem.create_stream, 1))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(ValueError, match="no checkpoint of this trainer"):
        verify_checkpoint(tmp_path / "step_00000001")
    assert Checkpoints(tmp_path, accelerator=None, keep_last=1).latest() == tmp_path / "step_00000001"


def test_files_are_on_the_disk_before_the_folder_gets_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source, target):
        events.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    model, optimizer = build(1)
    target = Checkpoints(tmp_path, Accelerator(cpu=True), keep_last=1).save(model, optimizer, {"step": 1})
    named = events.index(target)
    synced = {path.name.removesuffix(".tmp") for path in events[:named]}
    assert {target.name, *(path.name for path in target.iterdir())} <= synced
    assert events[named + 1 :] == [tmp_path]


def test_random_numbers_go_on_where_the_checkpoint_was_taken(tmp_path):
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(()).item()

    model, optimizer = build(1)
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep_last=1)
    target = checkpoints.save(model, optimizer, {"step": 1})
    drawn = draw()
    checkpoints.load(target, model, optimizer)
    assert draw() == drawn


@pytest.fixture
def writing(tmp_path, monkeypatch):
    """Asynchronous checkpoints of a small model, whose files wait for `released` before they reach the disk."""
    released = threading.Event()

    def held(path, content):
        assert released.wait(60)
        write_synced(path, content)

    monkeypatch.setattr("trainer.checkpoint.write_synced", held)
    model, optimizer = build(1)
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep_last=3, asynchronous=True)
    yield checkpoints, model, optimizer, released
    released.set()
    checkpoints.close()


def test_training_goes_on_while_a_checkpoint_is_written(writing):
    checkpoints, model, optimizer, released = writing
    train(model, optimizer, 1)
    before = weights(model)
    target = checkpoints.save(model, optimizer, {"step": 1})
    assert checkpoints.latest() is None
    train(model, optimizer, 2)  # must not reach the checkpoint
    after = weights(model)
    released.set()
    checkpoints.wait()
    assert checkpoints.latest() == target
    assert checkpoints.load(target, model, optimizer) == {"step": 1}
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert not all(torch.equal(after[name], before[name]) for name in before)
    train(model, optimizer, 2)
    assert all(torch.equal(weight, after[name]) for name, weight in weights(model).items())


def test_at_most_one_checkpoint_is_in_flight(writing):
    checkpoints, model, optimizer, released = writing
    checkpoints.save(model, optimizer, {"step": 1})
    second = threading.Thread(target=checkpoints.save, args=(model, optimizer, {"step": 2}))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001.tmp"]
    released.set()
    second.join(60)
    checkpoints.wait()
    assert [path.name for path in complete_checkpoints(checkpoints.folder)] == ["step_00000001", "step_00000002"]


def test_a_failure_in_the_background_is_told_once_and_raised_by_the_next_save(writing, monkeypatch):
    checkpoints, model, optimizer, released = writing
    released.set()
    first = checkpoints.save(model, optimizer, {"step": 1})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        fill_disk(patch, "__0_0.distcp")
        checkpoints.save(model, optimizer, {"step": 2})
        futures.wait([checkpoints._in_flight])
    assert "step_00000002 could not be written" in str(checkpoints.failure())
    assert checkpoints.failure() is None
    with pytest.raises(CheckpointError, match=f"the last complete one is {first}"):
        checkpoints.save(model, optimizer, {"step": 3})
    assert [path.name for path in checkpoints.folder.iterdir()] == [first.name]
    checkpoints.save(model, optimizer, {"step": 4})
    checkpoints.wait()
    assert checkpoints.latest().name == "step_00000004"


def test_a_failed_checkpoint_is_warned_of_at_once(make_config, monkeypatch):
    told = Checkpoints.failure

    def after_writing(self):
        futures.wait([self._in_flight] if self._in_flight else [])
        return told(self)

    monkeypatch.setattr(Checkpoints, "failure", after_writing)
    fill_disk(monkeypatch, "trainer_state.pt")
    config = make_config(eval_steps=0)
    with pytest.warns(CheckpointWarning, match=r"step 5: .*No space left"), pytest.raises(CheckpointError):
        run_pretraining(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("warnings") for line in lines[4:]] == [["CheckpointWarning"], None, None, None]


def test_every_so_many_steps_are_kept(tmp_path):
    for step in (2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26):  # that of 16 was put off by a high loss
        (tmp_path / f"step_{step:08d}").mkdir()
        prune(tmp_path, keep_last=2, keep_every_steps=8)
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [8, 17, 24, 26]


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for name in ("step_100000000", "step_99999999"):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_99999999", "step_100000000"]


def test_copies_under_other_names_are_no_checkpoints(tmp_path):
    for name in ("step_00000002", "step_00000004.bak", "step_backup"):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002"]
    prune(tmp_path, keep_last=1, keep_every_steps=2)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="is no checkpoint of this trainer: give a folder step_00001000 of a run's"):
        verify_checkpoint(tmp_path / "step_backup")


def test_an_interrupted_deletion_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "step_00000002/a").write_text("x")

    def interrupted(path, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(tmp_path / "step_00000002")
    assert complete_checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_list_of_checksums_is_named(finished):
    folder, _ = finished
    checksums = folder / "step_00000008/checksums.json"
    whole = json.loads(checksums.read_text())
    part = {name: value for name, value in whole.items() if not name.endswith(".distcp")}
    for content in ("{", "{}", "[]", json.dumps(part)):
        checksums.write_text(content)
        with pytest.raises(ValueError, match=r"checksums\.json is corrupted.* delete"):
            verify_checkpoint(checksums.parent)
    checksums.unlink()
    with pytest.raises(ValueError, match=r"lost its checksums\.json: if it is one, delete"):
        verify_checkpoint(folder / "step_00000008")
