import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystem

from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import complete_checkpoints, verify_checkpoint, write_synced
from trainer.errors import CheckpointError
from trainer.loop import run_pretraining


@pytest.fixture
def finished(trained_run, make_config, tmp_path):
    """Folder of checkpoints of a run of 8 steps, at 4 and 8, that lacks its model; and its configuration."""
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    return tmp_path / "run/checkpoints", make_config(eval_steps=0)


def test_only_the_last_ones_are_kept(make_config):
    config = make_config(checkpoint_steps=2, keep_last=2, eval_steps=0)
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
