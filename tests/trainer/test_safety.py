"""What can break around a run stops it with an error that names it, and leaves the last good checkpoint."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import _free_port
from trainer.checkpoint_files import complete_checkpoints, verify_checkpoint
from trainer.errors import CheckpointError, LostRankError, RunStoppedError
from trainer.loop import run_pretraining


def start_ranks(config, num_ranks: int, errors: Path) -> list:
    """Forked ranks whose process group accelerate makes, and whose errors go to `errors`."""
    context = multiprocessing.get_context("fork")
    port = _free_port()

    def main(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
        )
        try:
            run_pretraining(config)
        except BaseException as error:
            (errors / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)

    ranks = [context.Process(target=main, args=(rank,)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    return ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "timeout"),
    [(signal.SIGKILL, 60), pytest.param(signal.SIGSTOP, 20, marks=pytest.mark.slow)],
    ids=["dead", "silent"],
)
def test_the_others_end_when_a_rank_is_lost(make_config, tmp_path, how, timeout):
    config = make_config(total_tokens=128 * 5000, warmup_tokens=0, decay_tokens=0, timeout_seconds=float(timeout))
    ranks = start_ranks(config, 2, tmp_path)
    try:
        while not complete_checkpoints(tmp_path / "run/checkpoints") and ranks[0].is_alive():
            time.sleep(0.05)
        assert all(rank.is_alive() for rank in ranks)
        os.kill(ranks[1].pid, how)
        lost = time.monotonic()
        ranks[0].join(timeout + 60)
        assert ranks[0].exitcode == 1, "the other rank still waits"
        assert time.monotonic() - lost < timeout + (60 if how == signal.SIGSTOP else 0)  # a dead one is seen at once
        message = (tmp_path / "0.txt").read_text()
        assert message.startswith(f"{LostRankError.__name__}: rank 0 lost another rank at step ")
        last = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
        assert str(last) in message
        assert "start the same command again" in message
        verify_checkpoint(last)
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.distributed
def test_what_the_main_rank_refuses_ends_the_others_too(make_config, tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    ranks = start_ranks(make_config(timeout_seconds=60.0), 2, tmp_path)
    for rank in ranks:
        rank.join(90)
        assert rank.exitcode == 1
    assert "holds a finished run: choose another output_dir" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text().startswith("LostRankError: rank 1 lost another rank before the first step")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own with room for two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(make_config, small_disk, asynchronous):
    settings = {"checkpoint_steps": 2, "keep_last": 9, "eval_steps": 0, "async_checkpoints": asynchronous}
    config = make_config(output_dir=str(small_disk / "run"), **settings)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free the disk"):
        run_pretraining(config)
    kept = complete_checkpoints(small_disk / "run/checkpoints")
    assert kept
    assert len(list((small_disk / "run/checkpoints").iterdir())) == len(kept)
    for path in kept:
        verify_checkpoint(path)
    for path in kept[:-1]:
        shutil.rmtree(path)
    config.keep_last = 1
    assert run_pretraining(config).steps == 8


def test_a_limit_on_file_sizes_is_reported_like_a_full_disk(make_config, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            run_pretraining(make_config(eval_steps=0))
        except CheckpointError as error:
            os._exit(7 if "File too large" in str(error) else 8)
        os._exit(9)

    rank = multiprocessing.get_context("fork").Process(target=limited)
    rank.start()
    rank.join(120)
    assert rank.exitcode == 7
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_metrics_that_cannot_be_written_stop_the_run_with_its_last_checkpoint(make_config, monkeypatch):
    original = type(Path()).open

    def full(self, *args, **kwargs):
        file = original(self, *args, **kwargs)
        if self.name == "metrics.jsonl" and args == ("a",):
            return Full(file)
        return file

    class Full:
        lines = 0

        def __init__(self, file):
            self.file = file

        def write(self, text):
            Full.lines += 1
            if Full.lines > 6:
                raise OSError(28, "No space left on device")
            return self.file.write(text)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(type(Path()), "open", full)
    with pytest.raises(RunStoppedError, match=r"No space left on device at step 7; .*step_00000004: mend it"):
        run_pretraining(make_config(eval_steps=0))


def test_a_model_that_cannot_be_written_is_named_and_written_later(make_config, tmp_path, monkeypatch):
    config = make_config(eval_steps=0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(RunStoppedError, match=r"run/model could not be written.*No space left"):
            run_pretraining(config)
    assert not (tmp_path / "run/model.tmp").exists()
    assert run_pretraining(config).steps == 8


@pytest.mark.parametrize("file", ["train_00000.tokens.npy", "train_00000.ends.npy", "heldout_00000.tokens.npy"])
def test_a_lost_or_corrupted_shard_is_named_before_training(make_config, corpus_folder, tmp_path, file):
    shutil.copytree(corpus_folder / "shards", tmp_path / "shards")
    damaged = tmp_path / "shards/b" / file
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 4
    damaged.write_bytes(content)
    config = make_config(data_dir=str(tmp_path / "shards"))
    with pytest.raises(ValueError, match=f"shards/b/{file} is corrupted"):
        run_pretraining(config)
    damaged.unlink()
    with pytest.raises(ValueError, match=f"shards/b/{file} is lost"):
        run_pretraining(config)
