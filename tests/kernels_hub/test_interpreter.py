"""Every Triton kernel in Triton's interpreter, which needs TRITON_INTERPRET before triton is first imported."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
GDA = "tests/kernels_hub/test_repository_gda_attention.py"
DECODE = "tests/kernels_hub/test_repository_gda_decode.py"
PRODUCTS = "tests/kernels_hub/test_repository_decode_products.py"
OTHERS = [
    "tests/kernels_hub/test_repository_polynorm.py",
    "tests/kernels_hub/newton_schulz_interpreted.py",
    "tests/modeling_motif2/max_logits_interpreted.py",
    "tests/trainer/optim/fused_interpreted.py",
]
# The attention kernels with and without intervals, and a token's products, in both types that the interpreter
# multiplies rightly.
QUICK = [
    f"{GDA}::test_two_tiles_of_sixteen[causal-torch.float16]",
    f"{GDA}::test_two_tiles_of_sixteen[window-torch.float32]",
    f"{GDA}::test_reads_of_both_kinds[causal-descriptors]",
    f"{GDA}::test_where_kernels_in_gluon_fail_tritons_run[backward]",
    f"{DECODE}::test_full_caches[33-heads first-torch.float32]",
    f"{DECODE}::test_full_caches[16-heads first-torch.float16]",
    f"{PRODUCTS}::test_products[(40, 16, 16)-128-added-normed-torch.float32]",
    f"{PRODUCTS}::test_products[(24,)-96-alone-plain-torch.float16]",
    f"{PRODUCTS}::test_poly_norm[100-torch.float32]",
]


def interpret(junit: Path, *options: str) -> dict[str, int]:
    """Run tests in one process in which Triton interprets; how many passed by file. A failure fails the caller."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *options]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed: dict[str, int] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        file = case.get("classname").rpartition(".")[2]
        passed[file] = passed.get(file, 0) + (case.find("skipped") is None)
    return passed


@pytest.mark.timeout(600)
def test_quickly(tmp_path):
    passed = interpret(tmp_path / "found.xml", *OTHERS, *QUICK)
    least = {Path(test.partition("::")[0]).stem: 1 for test in OTHERS} | {Path(GDA).stem: 4, Path(DECODE).stem: 2}
    least |= {
        Path(PRODUCTS).stem: 3,
        "test_repository_polynorm": 40,
        "newton_schulz_interpreted": 25,
        "max_logits_interpreted": 4,
    }
    assert passed.keys() == least.keys()
    assert all(passed[file] >= least[file] for file in least), passed


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("files", [[*OTHERS, PRODUCTS], [GDA, DECODE]], ids=["others", "gda_attention"])
def test_everything(tmp_path, files):
    passed = interpret(tmp_path / "found.xml", *files, "-m", "not gpu", "--timeout", "3600")
    assert passed.keys() == {Path(file).stem for file in files}
    assert all(passed.values()), passed
