"""The attention kernels' code for Hopper, and their benchmarks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernels_hub

ROOT = Path(__file__).resolve().parents[2]
HOPPER_SHARED_BYTES = 232_448
FLOAT32 = {"lambda", "weight", "lse", "largest", "total", "partial", "delta"}


def compile_for_hopper(function, constants: dict, tiles):
    """A kernel compiled for compute capability 9.0 with bfloat16 heads; needs no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, divisible = {}, {}
    free = {"num_queries", "num_keys", "num_groups", "interval_stride", "raw_heads"}
    for index, name in enumerate(function.arg_names):
        if name.endswith("_ptr"):
            kind = name.removesuffix("_ptr")
            signature[name] = "*fp32" if kind in FLOAT32 else "*i32" if kind in ("first", "last", "runs") else "*bf16"
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if name in ("log2_scale", "scale", "eps", "out_scale") else "i32"
        if name not in constants and name not in free and signature[name] != "fp32":
            divisible[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "largest_spill"), [("forward", 0), ("query", 0), ("key_value", 150), ("decode", 0)]
)
def test_the_hopper_kernels_use_its_units_and_fit(kernel, largest_spill, tmp_path):
    from triton import knobs

    launch = kernels_hub.load_local("gda_attention").ops.launch
    tiles = getattr(launch.HOPPER, kernel)
    constants = {"RATIO": 4, "DIM": 128, "BLOCK_N": tiles.keys, "STAGES": tiles.stages, "PRECISION": "tf32"}
    constants["HAS_INTERVALS"] = kernel == "decode"
    if kernel == "decode":
        function = launch.decode_kernels.split_kernel
        constants |= {"SPLITS": 32, "ROWS": 16}
    else:
        constants["BLOCK_M"] = tiles.queries
        function = launch.backward_kernels.key_value_kernel
        if kernel != "key_value":
            constants["NOISE"] = False
            function = launch.backward_kernels.query_kernel
        if kernel == "forward":
            constants["SAVE_RAW"] = True
            function = launch.forward_kernels.forward_kernel
    compiled = compile_for_hopper(function, constants, tiles)
    assert ("mma.sync" if kernel == "decode" else "wgmma.mma_async") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= HOPPER_SHARED_BYTES
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= largest_spill, said
    assert "serialized" not in said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gda_attention.py", "decode.py"])
def test_the_benchmarks_run_through(script, tmp_path):
    command = [sys.executable, f"benchmarks/{script}", "--tiny", "--output", str(tmp_path)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "failed: nothing" in run.stdout
    assert len(list(tmp_path.glob("*_tiny.csv"))) == 1
