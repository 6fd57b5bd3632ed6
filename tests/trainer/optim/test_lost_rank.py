"""A rank that dies or does not come: the other ends in time and says why, on gloo, NCCL and with copy engines."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import _free_port
from tests.trainer.optim.lost_rank import TIMEOUT_SECONDS

ROOT = Path(__file__).resolve().parents[3]
SECONDS_TO_END = 30
# After a timeout PyTorch's watchdog sleeps for four times this, a minute by default, while ranks write down what they
# were at; then it ends the process.
SHORT_DUMP = {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000"}
OURS = r"MuonClip on rank 0 lost a rank among \[0, 1\]"
WATCHDOG = r"Watchdog caught collective operation timeout|NCCL.*remote process exited"
BARRIER = "barrier: rank 0 failed to receive signal from rank 1"

on_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "copy_engines", "how", "message"),
    [
        pytest.param("gloo", "0", "dies before", OURS, marks=pytest.mark.slow),
        pytest.param("gloo", "0", "hangs within", OURS, marks=pytest.mark.slow),
        pytest.param("nccl", "0", "dies before", f"{OURS}|{WATCHDOG}", marks=on_gpus),
        pytest.param("nccl", "0", "stays away", f"{OURS}|{WATCHDOG}", marks=on_gpus),
        pytest.param("nccl", "1", "dies within", BARRIER, marks=on_gpus),
        pytest.param("nccl", "1", "hangs within", BARRIER, marks=on_gpus),
    ],
)
def test_the_other_rank_ends_in_time_and_says_why(backend, copy_engines, how, message):
    port = str(_free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.optim.lost_rank", str(rank), port, backend, copy_engines, how],
            cwd=ROOT,
            env=os.environ | SHORT_DUMP,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        text = ""
        while "READY" not in text:
            line = ranks[0].stdout.readline()
            assert line, f"the first rank ended before the other was lost:\n{text[-3000:]}"
            text += line
        started = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks[0].wait(SECONDS_TO_END)
        code, seconds = ranks[0].poll(), time.perf_counter() - started
    finally:
        for rank in ranks:
            rank.kill()
        text += ranks[0].communicate()[0]
        ranks[1].communicate()
    print(f"{backend}, copy engines {copy_engines}, {how}: exit code {code} after {seconds:.1f} s", flush=True)
    print(text[-1500:], flush=True)
    assert code is not None, f"it had not ended after {SECONDS_TO_END} s:\n{text[-3000:]}"
    assert "the step went through" not in text
    assert code != 0
    assert re.search(message, text), text[-3000:]
    if not how.startswith("dies"):
        assert seconds > 0.8 * TIMEOUT_SECONDS, "it did not wait for a rank that might still have come"
