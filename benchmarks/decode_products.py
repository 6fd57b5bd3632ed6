"""Products of one token on one GPU: cuBLAS beside `kernels_hub/decode_products`, by the shapes of the 12.7B.

    python benchmarks/decode_products.py [--sweep] [--output DIR] [--tiny]

Every way is checked against float64 first. Times are those of a CUDA graph over copies of the weights that no cache
holds; "share" is that of a copy's bandwidth in the same run, by the weights' bytes. `--sweep` tries tiles too, and
those of attention to 1,024 and 16,384 cached tokens.

Shapes: K features in, N features out of all weights together.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from attention_cases import OUT_SCALE, ROOT, Report, copy_bandwidth, load_kernel, make_inputs, milliseconds, relative
from torch.nn.functional import linear

import kernels_hub

# Rows of each weight, K, whether a norm comes before and a sum after.
SHAPES = {
    "q, k, v": ((5120, 2048, 2048), 4096, True, False),
    "o": ((4096,), 8192, False, True),
    "gate, up": ((16384, 16384), 4096, True, False),
    "down": ((4096,), 16384, False, True),
    "head": ((219520,), 4096, False, False),
}
TINY = {"q, k, v": ((40, 16, 16), 64, True, False), "down": ((32,), 128, False, True)}
SWEEP = [
    (2, 1024, 4),
    (2, 2048, 4),
    (2, 2048, 8),
    (1, 2048, 4),
    (4, 512, 2),
    (4, 1024, 4),
    (4, 2048, 8),
    (8, 512, 4),
    (8, 1024, 8),
    (16, 512, 8),
    (16, 256, 4),
]
SPLITS = [(64, 8), (64, 16), (32, 16), (32, 32), (32, 64), (16, 32), (16, 64), (64, 32)]  # keys a tile, splits
LIMIT = 1e-2  # relative error in bfloat16
WORKING_BYTES = 6e8  # of all copies of a weight together (assumption: far more than the L2)
EPS = 1e-6


def definition(x, weights, norm_weight, residual):
    """In float64."""
    x = x.double()
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm_weight.double()
    out = torch.cat([x @ weight.double().T for weight in weights], dim=-1)
    return out if residual is None else out + residual.double()


def by_cublas(x, weights, norm_weight, residual):
    """The products alone, without norm and sum."""
    return [linear(x, weight) for weight in weights]


def make(sizes, features, normed, added, device, dtype):
    """One set of inputs; weights as a model has them, each a tensor of its own."""
    x = torch.randn(1, features, device=device, dtype=dtype)
    weights = [torch.randn(size, features, device=device, dtype=dtype).mul_(0.02) for size in sizes]
    norm_weight = 1 + 0.1 * torch.randn(features, device=device) if normed else None
    residual = torch.randn(1, sum(sizes), device=device, dtype=dtype) if added else None
    return x, weights, norm_weight, residual


def graph_milliseconds(function: Callable, sets: list, device: torch.device) -> dict:
    """Time of one call where calls over all sets are one graph."""
    if device.type != "cuda":
        return milliseconds(function, sets, 3, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in sets[:2]:
            function(one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            function(one)
    times = milliseconds(lambda _: graph.replay(), [None] * 2, 9, device)
    return {name: value / len(sets) for name, value in times.items()}


def ways(package, sizes: tuple, features: int, sweep: bool) -> dict[str, Callable]:
    """What is compared, by name."""
    launch = package.ops.launch

    def ours(inputs):
        x, weights, norm_weight, residual = inputs
        return package.product(x, weights, norm_weight=norm_weight, eps=EPS, residual=residual)

    found = {"cublas": lambda inputs: by_cublas(*inputs), "ours": ours}
    if sweep and launch is not None:
        for rows, columns, warps in SWEEP:
            if all(size % rows == 0 for size in sizes) and features % columns == 0:
                chosen = launch.Tile(rows, columns, warps)

                def swept(inputs, chosen=chosen):
                    x, weights, norm_weight, residual = inputs
                    return launch.product(x, weights, norm_weight, EPS, residual, chosen)

                found[f"{rows} x {columns}, {warps} warps"] = swept
    return found


def time_attention(report: Report, device: torch.device, dtype: torch.dtype, bandwidth: float, sweep: bool) -> None:
    """One token's attention to a static cache, by tiles and splits."""
    tiny = device.type == "cpu"
    kernel = load_kernel()
    groups, ratio, dim = (2, 2, 16) if tiny else (8, 4, 128)
    for length, seen in ((40, 21),) if tiny else ((1184, 1025), (16544, 16385)):
        last = torch.full((1, 1), seen - 1, dtype=torch.int32, device=device)
        bounds = {"first": torch.zeros_like(last), "last": last}
        sets = []
        for _ in range(2 if tiny else max(4, round(WORKING_BYTES / (length * groups * dim * 8)))):
            one = make_inputs(1, 1, length, groups, ratio, dim, dtype, device, False)
            one[2:4] = [each.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for each in one[2:4]]
            sets.append(one)  # caches are (B, heads, S, D)
        wanted = kernel.gda_decode(*sets[0], out_scale=OUT_SCALE, **bounds)
        found = {"as it is": lambda one, b=bounds: kernel.gda_decode(*one, out_scale=OUT_SCALE, **b)}
        for tile, splits in SPLITS if sweep and not tiny else ():
            tiles = kernel.ops.launch.Tiles(16, tile, 4, 3)
            constants = (*bounds.values(), dim**-0.5, 1e-5, OUT_SCALE, tiles, splits)
            found[f"{tile} keys, {splits} splits"] = lambda one, c=constants: kernel.ops.launch.decode(*one, *c)
        for way, function in found.items():
            error = relative(function(sets[0]), wanted)
            times = graph_milliseconds(function, sets, device)
            share = seen * groups * 4 * dim * dtype.itemsize / bandwidth / times["value"] * 1e3
            report.add("attention", way, f"S{seen}", "step", times.pop("value"), "ms", share=share,
                       note=f"error {error:.1e}", **times)  # fmt: skip


def main() -> int:
    """Checks and times every shape; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="other tiles too")
    parser.add_argument("--output", default=os.environ.get("OUT") or ROOT / "benchmarks" / "results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to prove the script without a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU: use --tiny to try the script")
    name = "decode_products" + ("_sweep" if options.sweep else "") + ("_tiny" if options.tiny else "")
    report = Report(options.output / f"{name}.csv", device)
    package = kernels_hub.load_local("decode_products")
    bandwidth = copy_bandwidth(device)
    report.add("copy", "bandwidth", "", "", bandwidth / 1e12, "TB/s")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def time_shape(shape: str, sizes: tuple, features: int, normed: bool, added: bool) -> None:
        weight_bytes = sum(sizes) * features * dtype.itemsize
        copies = 2 if device.type == "cpu" else max(2, round(WORKING_BYTES / weight_bytes))
        sets = [make(sizes, features, normed, added, device, dtype) for _ in range(copies)]
        for way, function in ways(package, sizes, features, options.sweep).items():
            x, weights, norm_weight, residual = sets[0]
            wanted = definition(x, weights, *((None, None) if way == "cublas" else (norm_weight, residual)))
            out = function(sets[0])
            error = relative(torch.cat(out, dim=-1) if isinstance(out, list) else out, wanted)
            if not error < LIMIT:
                raise AssertionError(f"{shape}, {way}: relative error {error:.1e} above {LIMIT:.0e}")
            times = graph_milliseconds(function, sets, device)
            share = weight_bytes / bandwidth / times["value"] * 1e3
            report.add(shape, way, f"{'+'.join(map(str, sizes))} x {features}", "product", times.pop("value"), "ms",
                       share=share, note=f"error {error:.1e}", **times)  # fmt: skip

    def poly_norm() -> None:
        both = [torch.randn(1, 2 * 16384, device=device, dtype=dtype) for _ in range(8)]
        factors = torch.full((3,), 1 / 3, device=device), torch.zeros(1, device=device)
        value = statistics.median(
            graph_milliseconds(lambda one: package.poly_norm_mul(one, *factors), both, device)["value"]
            for _ in range(3)
        )
        report.add("poly_norm", "ours", "2 x 16384", "forward", value, "ms")

    for shape, case in (TINY if options.tiny else SHAPES).items():
        report.section(shape, lambda shape=shape, case=case: time_shape(shape, *case))
    report.section("poly_norm", poly_norm)
    report.section("attention", lambda: time_attention(report, device, dtype, bandwidth, options.sweep))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
