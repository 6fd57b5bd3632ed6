"""Motif-2's attention backends on one accelerator: correct first, then the time of one 12.7B-shaped decoder layer.

`python benchmarks/modeling_motif2.py` compares every backend with the float64 reference of the tests in each dtype,
compiles the layer as one graph, generates with a static cache, and times forward and backward. A backend that failed
its check is not timed. Results go to $OUT, or to benchmarks/results/ when that is unset.

Shapes: B rows, T tokens.
"""

import argparse
import contextlib
import csv
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_motif2 import Motif2Config, Motif2ForCausalLM, attention, modeling_motif2  # noqa: E402
from modeling_motif2.diagnostics import attention_modules, track_max_logits  # noqa: E402
from tests.modeling_motif2.reference import reference_logits  # noqa: E402

RESULTS = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
FIELDS = ("section", "backend", "shape", "dtype", "direction", "value", "unit", "p20", "p80", "peak_gib", "note")
# Largest error of a logit over the largest logit; lambda as it is initialised, so that nothing cancels.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# Name: (attn_implementation, whether the value goes in one piece, kernel that SDPA must take).
BACKENDS = {
    "eager": ("eager", True, None),
    "sdpa": ("sdpa", False, None),
    "sdpa wide": ("sdpa", True, None),
    "sdpa cudnn": ("sdpa", False, SDPBackend.CUDNN_ATTENTION),
    "sdpa cudnn wide": ("sdpa", True, SDPBackend.CUDNN_ATTENTION),
    "flex_attention": ("flex_attention", False, None),
    "flash_attention_2": ("flash_attention_2", False, None),
}
HALF_ONLY = {"sdpa cudnn", "sdpa cudnn wide", "flash_attention_2"}


class Report:
    """Rows of the result table; every row is printed when it is known and written at the end."""

    def __init__(self, device: torch.device, path: Path):
        self.path = path
        self.rows: list[dict] = []
        self.failed: set[str] = set()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.common = {"device": name, "torch": torch.__version__, "commit": commit()}

    def add(self, section: str, backend: str, **values) -> None:
        """Adds a row, prints it with four digits, and writes the table, so that a run cut short keeps what it has."""
        row = {"section": section, "backend": backend} | values
        self.rows.append(row)
        shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        print(" | ".join(shown), flush=True)
        self.write()

    def fail(self, section: str, backend: str, error: BaseException) -> None:
        """Adds a row for a check that failed, and keeps the backend from being timed."""
        self.failed.add(backend)
        traceback.print_exc()
        self.add(section, backend, note=f"FAILED {type(error).__name__}: {error}".splitlines()[0][:300])

    def write(self) -> None:
        """Writes the CSV."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*FIELDS, *self.common])
            writer.writeheader()
            writer.writerows(row | self.common for row in self.rows)


def commit() -> str:
    """Short hash of the checkout, or what the environment says where there is no repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("COMMIT", "unknown")


@contextlib.contextmanager
def attending_with(model: torch.nn.Module, backend: str) -> Iterator[None]:
    """Runs the block with one of `BACKENDS`."""
    name, wide, kernel = BACKENDS[backend]
    before = set(attention.WIDE_VALUE_BACKENDS)
    attention.WIDE_VALUE_BACKENDS.discard(name)
    if wide:
        attention.WIDE_VALUE_BACKENDS.add(name)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name
    try:
        with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
            yield
    finally:
        attention.WIDE_VALUE_BACKENDS.clear()
        attention.WIDE_VALUE_BACKENDS.update(before)


def available(device: torch.device) -> list[str]:
    """Backends that can run on this machine."""
    names = list(BACKENDS)
    if device.type != "cuda":
        names = [name for name in names if "cudnn" not in name and name != "flex_attention"]
    if importlib.util.find_spec("flash_attn") is None:
        names.remove("flash_attention_2")
        print("flash_attention_2: not tested, flash_attn is not installed")
    return names


def small_model(device: torch.device, dtype: torch.dtype) -> Motif2ForCausalLM:
    """Two groups of 4 signal heads and a noise head, 128 wide as in the real model; 2 layers."""
    torch.manual_seed(0)
    config = Motif2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=10,
        num_key_value_heads=4,
        num_noise_heads=2,
        head_dim=128,
        initializer_range=0.06,
    )
    return Motif2ForCausalLM(config).to(device, dtype).eval()


def check_backends(report: Report, device: torch.device, dtypes: Sequence[torch.dtype] = tuple(TOLERANCES)) -> None:
    """Logits of whole, padded and packed rows, gradients and maximum logits, by backend and dtype."""
    lengths = (150, 61, 300)
    documents = [
        torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths
    ]
    for dtype, tolerance in TOLERANCES.items():
        if dtype not in dtypes:
            continue
        model = small_model(device, dtype)
        cpu = small_model(torch.device("cpu"), dtype)
        records = [{} for _ in documents]
        expected = [
            reference_logits(cpu, document, record) for document, record in zip(documents, records, strict=True)
        ]
        wide = small_model(device, dtype).double()
        wanted = gradients(wide, documents, device)
        for backend in available(device):
            if dtype == torch.float32 and backend in HALF_ONLY:
                continue
            try:
                with attending_with(model, backend):
                    check_one(report, model, backend, documents, expected, records, wanted, tolerance)
            except Exception as error:
                report.fail("check", f"{backend} {str(dtype).removeprefix('torch.')}", error)


def check_one(report, model, backend, documents, expected, records, wanted, tolerance) -> None:
    """Checks one backend in one dtype and reports the largest relative errors."""
    device, dtype = model.device, str(model.dtype).removeprefix("torch.")
    layouts = {"rows": [model(document[None].to(device)).logits[0] for document in documents]}
    width = max(len(document) for document in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, width - len(document) :] = document
    logits = model(ids.to(device), attention_mask=(ids != 0).long().to(device)).logits
    layouts["left padding"] = [logits[row, width - len(document) :] for row, document in enumerate(documents)]
    if "cudnn" not in backend:
        positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
        packed = model(torch.cat(documents)[None].to(device), position_ids=positions.to(device)).logits[0]
        layouts["packed"] = packed.split([len(document) for document in documents])
    for layout, outputs in layouts.items():
        error = max(relative(output.cpu(), target) for output, target in zip(outputs, expected, strict=True))
        report.add("check", backend, shape=layout, dtype=dtype, value=error, unit="relative error of logits")
        assert error < tolerance, f"{backend} {layout} {dtype}: relative error {error:.2e} above {tolerance:.0e}"
    found = gradients(model, documents, device)
    error = worst_gradient(found, wanted)
    report.add("check", backend, shape="gradients", dtype=dtype, value=error, unit="relative error, worst parameter")
    assert error < 5 * tolerance, f"{backend} gradients {dtype}: relative error {error:.2e} above {5 * tolerance:.0e}"
    track_max_logits(model)
    with torch.no_grad():
        model(ids.to(device), attention_mask=(ids != 0).long().to(device))
    for layer, module in enumerate(attention_modules(model)):
        largest = torch.tensor(
            [max(float(record["max_logits"][layer, head]) for record in records) for head in range(10)]
        )
        torch.testing.assert_close(module.max_logits.cpu(), largest, rtol=2 * tolerance, atol=2 * tolerance)
    track_max_logits(model, False)


def gradients(model: Motif2ForCausalLM, documents: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Gradients of the longest document's loss."""
    ids = documents[-1][None].to(device)
    return list(torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters())))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest value; not finite is infinite."""
    error = (actual.detach().double() - expected).abs().max() / expected.abs().max()
    return float(error) if torch.isfinite(error) else float("inf")


def worst_gradient(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest relative error of a parameter's gradient."""
    return max(
        float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in zip(found, wanted, strict=True)
    )


def check_compile(report: Report, device: torch.device) -> None:
    """The layer as one graph, forward and backward: as near to float64 as the same layer uncompiled."""
    ids = torch.randint(3, 512, (256,), generator=torch.Generator().manual_seed(0))
    exact = gradients(small_model(device, torch.bfloat16).double().train(), [ids], device)
    for backend in ("sdpa", "sdpa cudnn", "flex_attention"):
        if backend not in available(device) or f"{backend} bfloat16" in report.failed:
            continue
        try:
            plain = compiled_error(report, device, backend, "", ids, exact)
            compiled = compiled_error(report, device, backend, "layer", ids, exact)
            if not compiled < 1.5 * plain:  # which half of the layer it is
                for part in ("self_attn", "mlp"):
                    compiled_error(report, device, backend, part, ids, exact)
            assert compiled < 1.5 * plain, f"compiled gradients err by {compiled:.2e}, uncompiled ones by {plain:.2e}"
        except Exception as error:
            report.fail("compile", f"{backend} compiled", error)


def compiled_error(report: Report, device, backend: str, part: str, ids: torch.Tensor, exact: list) -> float:
    """Reports and returns the relative error of the gradient as one vector, with a part of every layer compiled."""
    torch._dynamo.reset()
    model = small_model(device, torch.bfloat16).train()
    with attending_with(model, backend):
        for layer in model.model.layers if part else []:
            module = layer if part == "layer" else getattr(layer, part)
            module.forward = torch.compile(module.forward, fullgraph=True)
        found = gradients(model, [ids], device)
    names = [name for name, _ in model.named_parameters()]
    broken = [name for name, gradient in zip(names, found, strict=True) if not torch.isfinite(gradient).all()]
    difference = sum((mine.double() - theirs).square().sum() for mine, theirs in zip(found, exact, strict=True))
    error = float((difference / sum(theirs.square().sum() for theirs in exact)).sqrt())
    values = {
        "shape": f"gradient, {f'fullgraph {part}' if part else 'uncompiled'}",
        "dtype": "bfloat16",
        "value": error,
    }
    note = f"not finite: {', '.join(broken)}"[:300] if broken else ""
    report.add("compile", backend, **values, unit="relative error of the gradient", note=note)
    return error


def check_generation(report: Report, device: torch.device) -> None:
    """Greedy tokens with a static cache (compiled by `generate` on an accelerator) and with a growing one."""
    for backend in ("sdpa", "flex_attention"):
        if backend not in available(device) or f"{backend} float32" in report.failed:
            continue
        torch._dynamo.reset()
        try:
            model = small_model(device, torch.float32)
            ids = torch.randint(3, 512, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
            options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            with attending_with(model, backend), torch.no_grad():
                grown = model.generate(ids, **options)
                static = model.generate(ids, cache_implementation="static", **options)
            same = bool(torch.equal(grown, static))
            report.add("generate", backend, shape="static against growing cache", dtype="float32", value=float(same))
            assert same, "a static cache changed what is generated"
        except Exception as error:
            report.fail("generate", f"{backend} static cache", error)


def check_precision(report: Report, device: torch.device, steps: int = 60) -> None:
    """The same training in float32 and under bfloat16 autocast: how far the losses part."""
    try:
        losses = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = small_model(device, torch.float32).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            generator = torch.Generator().manual_seed(0)
            losses[dtype] = []
            for _ in range(steps):
                start = torch.randint(3, 400, (8, 1), generator=generator)
                ids = ((start + torch.arange(64) * 7) % 500 + 3).to(device)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[dtype].append(loss.item())
        gap = max(abs(wide - half) for wide, half in zip(*losses.values(), strict=True))
        report.add("precision", "sdpa", shape=f"{steps} steps", dtype="bfloat16", value=gap, unit="largest loss gap")
        last = losses[torch.float32][-1]
        report.add("precision", "sdpa", shape=f"{steps} steps", dtype="float32", value=last, unit="last loss")
    except Exception as error:
        report.fail("precision", "sdpa", error)


def layer_12_7b(device: torch.device) -> torch.nn.Module:
    """One decoder layer of Motif-2-12.7B, bfloat16."""
    torch.manual_seed(0)
    config = Motif2Config(num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    return modeling_motif2.Motif2DecoderLayer(config, 1).to(device, torch.bfloat16)


def time_layers(report: Report, device: torch.device) -> None:
    """Forward and backward of one layer and of its attention alone, by backend and shape."""
    layer = layer_12_7b(device)
    rotary = modeling_motif2.Motif2RotaryEmbedding(layer.self_attn.config).to(device)
    cases = [(2, 4096, None), (1, 16384, None), (2, 4096, "left padding")]
    for rows, tokens, padding in cases:
        for backend in available(device):
            if f"{backend} bfloat16" in report.failed or (backend == "eager" and tokens > 4096):
                continue
            if backend == "flex_attention" and padding:
                continue
            for compiled in (False, True):
                name = f"{backend} compiled"
                compilable = backend in ("sdpa", "sdpa cudnn", "flex_attention") and name not in report.failed
                if compiled and (not compilable or padding or tokens > 4096):
                    continue
                try:
                    with attending_with(layer, backend):
                        time_case(report, layer, rotary, backend, rows, tokens, padding, compiled)
                except Exception as error:
                    report.add("layer", backend, shape=f"B{rows} T{tokens}", note=f"not timed: {error}"[:200])
                torch.cuda.empty_cache()


def time_case(report, layer, rotary, backend, rows, tokens, padding, compiled) -> None:
    """Times one layer, and its attention without the projections' share being taken out."""
    device = layer.self_attn.q_proj.weight.device
    mask = None
    if padding:
        index = torch.arange(tokens, device=device)
        starts = torch.tensor([0, tokens // 4], device=device)[:rows]
        mask = (index[:, None] >= index)[None, None] & (index >= starts[:, None])[:, None, None]
    if backend == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=device.type)
    elif backend == "eager" and mask is None:
        index = torch.arange(tokens, device=device)
        mask = (index[:, None] >= index)[None, None]
    if backend == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)
    # Several inputs, so that none stays in the cache.
    inputs = [
        torch.randn(rows, tokens, 4096, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    position_ids = torch.arange(tokens, device=device)[None]
    arguments = {"position_embeddings": rotary(inputs[0], position_ids), "attention_mask": mask}
    arguments["position_ids"] = position_ids
    parts = {"layer": layer} if compiled else {"layer": layer, "attention": layer.self_attn}
    for part, module in parts.items():
        forward = module.forward if not compiled else torch.compile(module.forward, fullgraph=True)

        def run(states, forward=forward):
            out = forward(states, **arguments)
            return out[0] if isinstance(out, tuple) else out

        name = f"{backend} compiled" if compiled else backend
        shape = f"B{rows} T{tokens}" + (f" {padding}" if padding else "")
        for direction, figures in measure(run, inputs, [*module.parameters()]).items():
            report.add(part, name, shape=shape, dtype="bfloat16", direction=direction, unit="ms", **figures)


def measure(run: Callable, inputs: list[torch.Tensor], parameters: list, rounds: int = 9) -> dict[str, dict]:
    """Median, p20 and p80 in milliseconds of the forward and the backward, and the peak of memory in GiB."""
    gradient = torch.randn_like(inputs[0])
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for attempt in range(rounds + 2):
        states = inputs[attempt % len(inputs)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        marks[0].record()
        out = run(states)
        marks[1].record()
        torch.autograd.grad(out, [states, *parameters], gradient)
        marks[2].record()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
        if attempt >= 2:
            times["forward"].append(marks[0].elapsed_time(marks[1]))
            times["backward"].append(marks[1].elapsed_time(marks[2]))
    return {
        direction: {
            "value": statistics.median(values),
            "p20": statistics.quantiles(values, n=5)[0],
            "p80": statistics.quantiles(values, n=5)[-1],
            "peak_gib": peak,
        }
        for direction, values in times.items()
    }


# What can be run by itself, as `--parts float16 compile`; a part that was not run checks nothing for those after it.
PARTS = {
    **{
        str(dtype).removeprefix("torch."): lambda report, device, dtype=dtype: check_backends(report, device, [dtype])
        for dtype in TOLERANCES
    },
    "compile": check_compile,
    "generate": check_generation,
    "precision": check_precision,
    "layer": time_layers,
}


def main() -> int:
    """Runs the parts in order and returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "modeling_motif2.csv", help="table to write")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" and "layer" in options.parts:
        options.parts.remove("layer")  # times are an accelerator's
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64  # FlexAttention compiles for every shape of the checks
    report = Report(device, options.results)
    for part in options.parts:
        started = time.perf_counter()
        try:
            PARTS[part](report, device)
        except Exception as error:
            report.fail(part, "all", error)
        print(f"# {part}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"# written to {options.results}; failed: {', '.join(sorted(report.failed)) or 'nothing'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
