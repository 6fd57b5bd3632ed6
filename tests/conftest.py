"""Settings every test shares: no hub, one thread a process, and where the real data lies."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real evaluation, fine-tuning and pre-training data; the test skips where it does not exist."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not on this machine: put it in ../shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
