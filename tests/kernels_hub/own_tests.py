"""The tests that a kernel repository carries, for a test file of ours to take over as its own."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORIES = Path(__file__).resolve().parents[2] / "kernels_hub"


def own_tests(repository: str, *modules: str) -> dict:
    """Tests, fixtures and helpers of a repository's test modules.

    Every repository calls its package of tests `tests`, as this folder's is called: each gets a name of its own here.

    Args:
        repository: folder in kernels_hub.
        modules: which of its test modules, without ending.

    Returns:
        dict: the modules' names, later ones winning, after those of `conftest`.
    """
    name = f"{repository}_tests"
    if name not in sys.modules:
        pytest.register_assert_rewrite(name)
        folder = REPOSITORIES / repository / "tests"
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    found = {}
    for module in ("conftest", *modules):
        found |= vars(importlib.import_module(f"{name}.{module}"))
    return {key: value for key, value in found.items() if not key.startswith(("__", "pytest_"))}
