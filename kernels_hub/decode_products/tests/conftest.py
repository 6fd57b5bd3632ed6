"""Loads the kernel the way a user does, and lets Triton's interpreter run it on a CPU (`TRITON_INTERPRET=1`)."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        # NumPy 2.4 converts only 0-d arrays to a scalar, and the interpreter keeps its scalars in 1-d ones.
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: run by the Hub's continuous integration")
    config.addinivalue_line("markers", "slow: minutes in Triton's interpreter")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernel runs: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def kernel(device):
    """The built variant for `device`, loaded from this folder through `kernels`, or as a package where that lacks."""
    repository = Path(__file__).resolve().parents[1]
    if importlib.util.find_spec("kernels"):
        from kernels import get_local_kernel

        return get_local_kernel(repository, backend="cpu" if device == "cpu" else None)
    variant = repository / "build" / f"torch-{device}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def poisoned():
    """Fills every new tensor with NaN, so that an element that a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
