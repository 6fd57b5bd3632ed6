"""A run that is killed with SIGKILL, again and again, continues to the undisturbed run's curve."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

from tests.distributed import _free_port
from tests.trainer.test_loop import curve
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import complete_checkpoints
from trainer.data.shards import file_checksum
from trainer.loop import run_pretraining

slow = pytest.mark.slow


@pytest.mark.distributed
@pytest.mark.timeout(1200)  # twenty kills beside other work
@pytest.mark.parametrize(
    ("num_ranks", "num_kills", "asynchronous"),
    [
        (1, 1, True),
        pytest.param(1, 2, True, marks=slow),
        pytest.param(1, 20, True, marks=slow),
        pytest.param(2, 20, True, marks=slow),
        pytest.param(1, 20, False, marks=slow),
        pytest.param(2, 20, False, marks=slow),
    ],
)
def test_random_kills_do_not_change_the_curve(make_config, tmp_path, monkeypatch, num_ranks, num_kills, asynchronous):
    steps = 8 + 14 * num_kills
    settings = {
        "total_tokens": 128 * steps,
        "checkpoint_steps": 2,
        "eval_steps": 20,
        "async_checkpoints": asynchronous,
    }
    whole = make_config(output_dir=str(tmp_path / "whole"), **settings)
    killed = make_config(output_dir=str(tmp_path / "killed"), **settings)
    for rank in start(whole, num_ranks):
        rank.join()
    linger_in_writing(monkeypatch, tmp_path / "die")
    note_loads(monkeypatch, tmp_path / "loads")
    (tmp_path / "die").touch()
    moments = random.Random(num_kills)
    steps_at_kills, killed_in_writing = [], 0
    for _ in range(num_kills):
        ranks = start(killed, num_ranks)
        if (tmp_path / "die").exists():  # the first time in writing the second checkpoint
            multiprocessing.connection.wait([rank.sentinel for rank in ranks], timeout=60)
            assert {rank.exitcode for rank in ranks} <= {None, -signal.SIGKILL}
        else:
            wait_for_lines(tmp_path / "killed/metrics.jsonl", moments.randint(1, 10), ranks)
            time.sleep(moments.uniform(0, 0.3))  # anywhere: in a step, in writing a checkpoint, in renaming it
            assert all(rank.is_alive() for rank in ranks), "the run ended before it was killed: make it longer"
        for rank in ranks:
            rank.kill()  # SIGKILL
            rank.join()
        killed_in_writing += bool(list((tmp_path / "killed/checkpoints").glob("*.tmp")))
        steps_at_kills.append(len((tmp_path / "killed/metrics.jsonl").read_text().splitlines()))
    for rank in start(killed, num_ranks):
        rank.join()
        assert rank.exitcode == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert killed_in_writing
    assert all(0 < lines < steps for lines in steps_at_kills)
    assert len(set(steps_at_kills)) > (num_kills - 1) / 2
    assert len((tmp_path / "loads").read_text().splitlines()) == num_kills * num_ranks


def linger_in_writing(monkeypatch, die: Path) -> None:
    """Spend a random while between the writes of a checkpoint, so that steps, and kills, fall in between.

    While the file `die` exists, a rank that writes a second checkpoint removes it and kills itself in the middle.
    """
    moments = random.Random(os.getpid())

    def slow_checksum(path: Path) -> str:
        time.sleep(moments.uniform(0, 0.02))
        if complete_checkpoints(path.parent.parent):
            with contextlib.suppress(FileNotFoundError):
                die.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return file_checksum(path)

    monkeypatch.setattr("trainer.checkpoint.file_checksum", slow_checksum)


def note_loads(monkeypatch, loads: Path) -> None:
    """Write a line to `loads` whenever a rank goes on from a checkpoint."""
    original = Checkpoints.load

    def load(self, path, model, optimizer):
        with loads.open("a") as file:
            file.write(f"{path}\n")
        return original(self, path, model, optimizer)

    monkeypatch.setattr(Checkpoints, "load", load)


def start(config, num_ranks: int) -> list:
    """Forked ranks that train; forking saves the imports of twenty starts."""
    context = multiprocessing.get_context("fork")
    port = _free_port()
    ranks = [context.Process(target=train, args=(config, rank, num_ranks, port)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    return ranks


def train(config, rank: int, num_ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is shared by all forked ranks, and stays locked when its holder is killed
    if num_ranks > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
        )
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    run_pretraining(config)
    os._exit(0)


def wait_for_lines(metrics: Path, count: int, ranks: list) -> None:
    """Return once the restarted run has written `count` more lines."""
    seen: set[int] = set()
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while len(seen) < count and all(rank.is_alive() for rank in ranks):
        time.sleep(0.02)
        if metrics.exists() and metrics.stat().st_mtime_ns > before:
            seen.add(metrics.stat().st_mtime_ns)
