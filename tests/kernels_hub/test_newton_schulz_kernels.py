"""The Newton-Schulz kernels without a GPU: compiled for Hopper, and as a Hub repository."""

import importlib
import re
import subprocess
import tomllib

import pytest
import torch

from kernels_hub.build import differences
from tests.kernels_hub.newton_schulz_cases import REPOSITORY, load_package

HOPPER_SHARED_BYTES = 232_448


def compile_for_hopper(config, has_addend: bool):
    """The symmetric product compiled for compute capability 9.0; needs no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = importlib.import_module("newton_schulz.triton_kernels").symmetric_product_kernel
    block, wide, depth = config.block, config.wide, config.block_k
    blocks = {"left": (block, depth), "right": (wide, depth), "right_narrow": (block, depth)}
    blocks |= {"addend": (block, block), "output": (block, block)}
    signature = {name: f"tensordesc<fp16[1,{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    signature |= dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
    signature |= dict.fromkeys(("depth", "tiles_each", "odd_diagonals_each", "batch"), "i32")
    constants = {"BLOCK": block, "WIDE": wide, "BLOCK_K": depth, "HAS_ADDEND": has_addend, "HAS_GAMMA": False}
    constants |= {"PROGRAMS": 132, "FLATTEN": config.flatten}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_stages": config.num_stages, "num_warps": config.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("has_addend", [False, True])
def test_the_hopper_kernel_uses_its_units_and_spills_nothing(has_addend, tmp_path):
    from triton import knobs

    load_package()
    config = importlib.import_module("newton_schulz.triton_products").HOPPER
    compiled = compile_for_hopper(config, has_addend)
    ptx = compiled.asm["ptx"]
    for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "stmatrix.sync.aligned.m8n8.x4.trans"):
        assert instruction in ptx
    assert compiled.metadata.shared <= HOPPER_SHARED_BYTES
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", said), said
    assert "serialized" not in said


def test_the_built_variants_are_those_of_the_sources():
    assert differences(REPOSITORY) == [], "run python kernels_hub/build.py newton_schulz"


def test_the_repository_is_complete():
    general = tomllib.loads((REPOSITORY / "build.toml").read_text())["general"]
    assert general["name"] == "newton-schulz"
    assert {f"torch-{backend}" for backend in general["backends"]} == {
        p.name for p in (REPOSITORY / "build").iterdir()
    }
    assert (REPOSITORY / "CARD.md").is_file()


def test_the_built_kernel_loads_and_runs():
    from kernels import get_local_kernel

    kernel = get_local_kernel(REPOSITORY, backend="cpu")
    matrices = torch.randn(2, 6, 9)
    assert torch.equal(kernel.newton_schulz(matrices), load_package().newton_schulz(matrices))
    compiled = torch.compile(kernel.newton_schulz, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(matrices), kernel.newton_schulz(matrices))
