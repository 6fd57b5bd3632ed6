"""Settings every test shares: no hub, one thread a process, and where the real data lies."""

import functools
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from torch.utils import collect_env

torch.set_num_threads(1)
gc.disable()  # imports leave no garbage to look for; `pytest_collection_finish` turns it on again
# Every evaluation asks for it, and it starts a dozen programs to find out what stays the same.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


# Files with single long tests come first, so that no worker is left with one when the others have finished.
LONG_FILES = ("test_demo.py", "test_interpreter.py", "test_upload.py", "test_kill.py", "test_execution.py")


def pytest_collection_modifyitems(items):
    """Sort by file where the file is a long one; the rest keeps its order."""
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish():
    """Leave what is imported by now out of every later collection: each would look through all of it again."""
    gc.freeze()
    gc.enable()


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
