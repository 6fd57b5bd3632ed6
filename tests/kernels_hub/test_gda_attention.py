"""The attention repository's own tests on the CPU, in torch and in Triton's interpreter, and its code for Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What the default run interprets: every kernel, with and without intervals; the whole takes minutes.
QUICK = "heads and (test_values and float16 or test_full_caches and 33 and float32) or test_windows and 5"


def run_own_tests(interpreted: bool, *options: str) -> None:
    """Runs the repository's tests in a process of its own: Triton reads TRITON_INTERPRET once, when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "kernels_hub/gda_attention/tests"]
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    run = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_in_torch():
    run_own_tests(interpreted=False)


@pytest.mark.timeout(600)
def test_in_the_interpreter():
    run_own_tests(True, "-k", QUICK)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_everything_in_the_interpreter():
    run_own_tests(True, "-m", "not gpu", "--timeout", "3600")
