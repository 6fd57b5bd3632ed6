"""A run that is killed with SIGKILL, again and again, continues to the undisturbed run's curve."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import _free_port
from tests.trainer.test_loop import curve
from trainer.loop import run_pretraining

NUM_KILLS = 20


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_twenty_random_kills_do_not_change_the_curve(make_config, tmp_path, num_ranks):
    settings = {"total_tokens": 128 * 60, "checkpoint_steps": 2, "eval_steps": 20}
    whole = make_config(output_dir=str(tmp_path / "whole"), **settings)
    killed = make_config(output_dir=str(tmp_path / "killed"), **settings)
    for rank in start(whole, num_ranks):
        rank.join()
    moments = random.Random(0)
    steps_at_kills = []
    for _ in range(NUM_KILLS):
        ranks = start(killed, num_ranks)
        wait_for_lines(tmp_path / "killed/metrics.jsonl", moments.randint(1, 5), ranks)
        time.sleep(moments.uniform(0, 0.3))  # anywhere: in a step, in writing a checkpoint, in renaming it
        assert all(rank.is_alive() for rank in ranks), "the run ended before it was killed: make it longer"
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
            rank.join()
        steps_at_kills.append(len((tmp_path / "killed/metrics.jsonl").read_text().splitlines()))
    for rank in start(killed, num_ranks):
        rank.join()
        assert rank.exitcode == 0
    assert max(steps_at_kills) > 10
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


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
