"""The attention kernels' code for Hopper, and their benchmarks."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels_hub

ROOT = Path(__file__).resolve().parents[2]
HOPPER_SHARED_BYTES = 232_448
# Bytes that a pass keeps in memory for want of registers, by whether it reads through descriptors.
LARGEST_SPILL = {("value", False): 60}
INT32 = {"first", "last", "runs"}
FLOAT32 = {"lambda", "weight", "lse", "largest", "total", "partial", "delta"}


def compile_for(capability: int, function, constants: dict, warps: int, boxes: dict[str, list[int]]):
    """A kernel compiled for a compute capability with bfloat16 heads; needs no device.

    Args:
        capability: 90 of Hopper.
        function: the kernel.
        constants: its compile-time arguments.
        warps: of a program.
        boxes: shapes that the tensor descriptors among its arguments load; pointers where there are none.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, divisible = {}, {}
    free = {"num_queries", "num_keys", "num_groups", "interval_stride", "raw_signals", "blocks_a_head"}
    free |= {"first_group", "groups_here", "first_block", "blocks_here", "base", "rows_and_groups"}
    for index, name in enumerate(function.arg_names):
        if name in boxes:
            signature[name] = f"tensordesc<bf16{boxes[name]}>"
            continue
        if name.endswith(("_ptr", "_source")) or name == "dmap":
            kind = name.removesuffix("_ptr")
            signature[name] = "*fp32" if kind in FLOAT32 else "*i32" if kind in INT32 else "*bf16"
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if name in ("log2_scale", "scale", "eps", "out_scale") else "i32"
        if name not in constants and name not in free and signature[name] != "fp32":
            divisible[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def case(launch, plan, kernel: str, descriptors: bool):
    """A kernel with its tile of a plan, its compile-time arguments, and its descriptors' boxes."""
    tiles = getattr(plan, kernel)
    backward = launch.backward_kernels
    constants = {"RATIO": 4, "DIM": 128, "BLOCK_M": tiles.queries, "STAGES": tiles.stages, "PRECISION": "tf32"}
    constants |= {"HAS_INTERVALS": False}
    edge, boxes = plan.query.queries, {}
    queries, keys = ([1, size, 1, 1, 128] for size in (tiles.queries, tiles.keys))
    if kernel == "decode":
        del constants["BLOCK_M"]
        constants |= {"SPLITS": 32, "ROWS": 16, "BLOCK_N": tiles.keys, "HAS_INTERVALS": True}
        return launch.decode_kernels.split_kernel, constants, boxes
    if kernel == "forward":
        constants |= {"NOISE": False, "SAVE_RAW": True, "BLOCK_N": tiles.keys}
        return launch.forward_kernels.forward_kernel, constants, boxes
    if kernel == "key":
        constants |= {"TRIANGULAR": True, "ADD": False, "EDGE": edge}
        return backward.key_kernel, constants, boxes
    constants |= {"DESCRIPTORS": descriptors, "BLOCK_N": tiles.keys}
    if kernel == "query":
        constants |= {"TRIANGULAR": True}
        boxes = {"key_source": keys, "value_source": keys, "dmap": [edge, tiles.keys]}
    else:
        boxes = dict.fromkeys(("signal_source", "noise_source", "draw_source"), queries)
    return getattr(backward, f"{kernel}_kernel"), constants, boxes if descriptors else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "descriptors"),
    [("forward", False), ("decode", False), ("key", False)]
    + [(kernel, descriptors) for kernel in ("query", "value") for descriptors in (False, True)],
)
def test_the_hopper_kernels_use_its_units_and_fit(kernel, descriptors, tmp_path):
    from triton import knobs

    launch = kernels_hub.load_local("gda_attention").ops.launch
    function, constants, boxes = case(launch, launch.HOPPER, kernel, descriptors)
    compiled = compile_for(90, function, constants, getattr(launch.HOPPER, kernel).warps, boxes)
    assert ("mma.sync" if kernel == "decode" else "wgmma.mma_async") in compiled.asm["ptx"]
    assert ("cp.async.bulk.tensor" in compiled.asm["ptx"]) == descriptors
    assert compiled.metadata.shared <= HOPPER_SHARED_BYTES
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= LARGEST_SPILL.get((kernel, descriptors), 0), said


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "query", "key", "value", "decode"])
@pytest.mark.parametrize(
    ("capability", "shared_bytes"), [(80, 166_912), (89, 101_376), (100, 232_448), (120, 101_376)]
)
def test_other_architectures_get_kernels_that_fit(monkeypatch, capability, shared_bytes, kernel):
    launch = kernels_hub.load_local("gda_attention").ops.launch
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_bytes, shared_memory_per_block=49_152)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    plan = launch.plan.__wrapped__(128, 2, torch.device("cuda"))
    function, constants, boxes = case(launch, plan, kernel, getattr(plan, kernel).descriptors)
    compiled = compile_for(capability, function, constants, getattr(plan, kernel).warps, boxes)
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= shared_bytes


def compile_gluon(function, constants: dict, boxes: dict[str, tuple[int, int]], options: dict):
    """A Gluon kernel compiled for compute capability 9.0; arguments as in `compile_for`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    free = {"T", "num_groups", "rows_and_groups", "raw_signals", "size", "first_group", "groups_here", "first_block"}
    free |= {"blocks_here", "base", "interval_stride"}
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in boxes:
            signature[name] = f"tensordesc<bf16[1, {boxes[name][0]}, {boxes[name][1]}],{layout!r}>"
        elif name.endswith("_ptr"):
            kind = name.removesuffix("_ptr")
            integers = INT32 if constants["HAS_INTERVALS"] else ()  # without, other pointers are handed over
            signature[name] = "*i32" if kind in integers else "*fp32" if kind in FLOAT32 | INT32 else "*bf16"
            divisible[index,] = [["tt.divisibility", 16]]
        elif name in ("log2_scale", "scale", "eps", "out_scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in free:
                divisible[index,] = [["tt.divisibility", 16]]
    source = GluonASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("intervals", [False, True], ids=["causal", "intervals"])
@pytest.mark.parametrize("kernel", ["value", "query", "key", "forward"])
def test_the_kernels_written_for_hopper_fit_without_spills(kernel, intervals, tmp_path):
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from triton import knobs

    module = kernels_hub.load_local("gda_attention").ops.launch.hopper_passes
    boxes = {"signal": (64, 128), "noise": (64, 128), "key": (64, 128), "value": (64, 256), "dout": (64, 256)}
    boxes |= {"dmap": (64, 128), "query": (64, 128)}
    constants = {
        "value": {"BLOCK_M": 64, "STAGES": 3},
        "query": {"BLOCK_N": 64, "KEY_STAGES": 4, "VALUE_STAGES": 2},
        "key": {"ADD": False, "STAGES": 4},
        "forward": {"NOISE": False, "SAVE_RAW": True, **module.FORWARD_RINGS},
    }[kernel] | {"RATIO": 4, "HAS_INTERVALS": intervals}
    source = getattr(module, f"hopper_{kernel}")
    options = {"num_warps": module.hopper_tiles.WARPS, "maxnreg": module.hopper_tiles.REGISTERS}
    compiled = compile_gluon(getattr(source, f"{kernel}_kernel"), constants, boxes, options)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "setmaxnreg" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= HOPPER_SHARED_BYTES
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) == 0, said
    assert "serialized" not in said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gda_attention.py", "decode.py"])
def test_the_benchmarks_run_through(script, tmp_path):
    command = [sys.executable, f"benchmarks/{script}", "--tiny", "--output", str(tmp_path)]
    if script == "gda_attention.py":
        command += ["--sections", "check,operator,packed,sweep,layer"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "failed: nothing" in run.stdout
    assert len(list(tmp_path.glob("*_tiny.csv"))) == 1
