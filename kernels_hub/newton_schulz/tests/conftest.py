"""Loads the kernel the way a user does."""

from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: run by the Hub's continuous integration")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernel runs: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def kernel(device):
    """The built variant for `device`, loaded from this folder through `kernels`."""
    from kernels import get_local_kernel

    return get_local_kernel(Path(__file__).resolve().parents[1], backend="cpu" if device == "cpu" else None)
