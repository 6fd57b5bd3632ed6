"""Growth at full size on a small machine: random Motif-2.6B shards become Motif-2-12.7B, with one interruption.

`python benchmarks/growth_full_size.py --folder SCRATCH` needs 31 GB of disk (62 GB with --dtype float32) and
deletes what it wrote. With --layers 8 the source has a quarter of the blocks, and its largest tensors all the same: 11
and 22 GB. It checks the index, every shape, checksums and sampled rows, and writes seconds and peak memory
(VmHWM of the growing process) to growth_full_size.csv in $OUT, or in benchmarks/results/ when that is unset. A run
replaces the row of its dtype and number of layers and keeps the others. $COMMIT names the commit where there is no
repository.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_motif2 import Motif2Config  # noqa: E402
from modeling_motif2.growth_files import INDEX, MANIFEST, CheckpointReader, file_sha256  # noqa: E402
from modeling_motif2.growth_plan import tensor_shapes  # noqa: E402

RESULTS = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
GROWTH = ["--width", "2", "--signal_ratio", "4", "--insert_every", "4", "--noise_snr_db", "20"]
PUBLISHED_LAYERS = 32
LAYERS_A_SHARD = 8
MEMORY_LIMIT_BYTES = 6 * 2**30


def small_config(num_layers: int) -> Motif2Config:
    """Motif-2.6B's shape, with as many blocks as wanted."""
    return Motif2Config(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_noise_heads=None,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )


def write_source(folder: Path, dtype: torch.dtype, config: Motif2Config) -> None:
    """Writes a random checkpoint in the official layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_official_dict()))
    generator = torch.Generator().manual_seed(0)
    shards: dict[int, dict] = {}
    for name, shape in tensor_shapes(config).items():
        shard = int(name.split(".")[2]) // LAYERS_A_SHARD if ".layers." in name else 0
        shards.setdefault(shard, {})[name] = shape
    weight_map = {}
    for shard, shapes in shards.items():
        file = f"model-{shard + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            spread, mean = (0.1, 0.0) if "lambda" in name else (0.02, 1.0 if len(shape) == 1 else 0.0)
            tensors[name] = (torch.randn(shape, generator=generator) * spread + mean).to(dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def run_growth(
    source: Path, output: Path, *extra: str, interrupt_after_shards: int | None = None
) -> tuple[float, int]:
    """Runs `motif2-grow` in a process of its own.

    Returns:
        Seconds, and the process's largest resident memory in bytes.

    Raises:
        RuntimeError: it failed, or ended before it could be interrupted.
    """
    command = [sys.executable, "-m", "modeling_motif2.growth", "--source", str(source), "--output", str(output)]
    started = time.monotonic()
    with log_path(output).open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, *GROWTH, *extra], cwd=ROOT, env=environment, stdout=log)
    peak = 0
    while process.poll() is None:
        # Not ru_maxrss: a child inherits its parent's, and this process has held the source's shards.
        peak = max(peak, peak_resident_bytes(process.pid))
        if interrupt_after_shards is not None and len(list(output.glob("*.safetensors"))) >= interrupt_after_shards:
            time.sleep(3)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.2)
    code = process.wait()
    if code != (0 if interrupt_after_shards is None else -signal.SIGKILL):
        raise RuntimeError(f"motif2-grow ended with {code}")
    return time.monotonic() - started, peak


def peak_resident_bytes(pid: int) -> int:
    """Largest resident memory of a running process since its program started; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def log_path(output: Path) -> Path:
    """File that takes what the latest `motif2-grow` printed."""
    return output.with_suffix(".log")


def check_tensors(source: CheckpointReader, grown: CheckpointReader, source_layers: int) -> int:
    """Compares names and shapes with Motif-2-12.7B's, and sampled rows with the written rules.

    Returns:
        Number of rows compared.
    """
    layers = source_layers + source_layers // 4
    published = tensor_shapes(Motif2Config(num_hidden_layers=layers))
    assert len(published) == 643 or source_layers != PUBLISHED_LAYERS
    assert {name: grown.shape(name) for name in grown.names} == published
    generator = torch.Generator().manual_seed(1)

    def rows(reader: CheckpointReader, name: str, row: int) -> torch.Tensor:
        return reader.rows(name, row, row + 1)[0].double()

    compared = 0
    for row in torch.randint(Motif2Config().vocab_size, (50,), generator=generator).tolist():
        embedding = rows(source, "model.embed_tokens.weight", row).repeat(2)
        assert torch.equal(rows(grown, "model.embed_tokens.weight", row), embedding)
        assert torch.equal(rows(grown, "lm_head.weight", row), embedding / 2)
        compared += 2
    for layer in range(layers):
        parent, inserted = layer - (layer + 1) // 5, layer % 5 == 4
        old, new = f"model.layers.{parent}.", f"model.layers.{layer}."
        group, copy, feature = (int(torch.randint(high, (), generator=generator)) for high in (8, 5, 128))
        pairs = [
            ("self_attn.q_proj", (group * 5 + copy) * 128 + feature, (group * 2 + copy // 4) * 128 + feature),
            ("self_attn.k_proj", group * 256 + feature, group * 256 + feature),
            ("self_attn.v_proj", group * 256 + feature, group * 256 + feature),
            ("mlp.gate_proj", 8192 + group * 512 + feature, group * 512 + feature),
            ("mlp.up_proj", group * 512 + feature, group * 512 + feature),
        ]
        for name, new_row, old_row in pairs:
            copies = rows(grown, f"{new}{name}.weight", new_row).view(2, -1)
            weight = rows(source, f"{old}{name}.weight", old_row)
            check_copies(copies, weight, grown.dtype(f"{new}{name}.weight"))
        for name, copies_shape in (("self_attn.o_proj", (8, 4, 256)), ("mlp.down_proj", (1, 2, 8192))):
            grown_row = rows(grown, f"{new}{name}.weight", 2048 + feature)
            if inserted:
                assert not grown_row.any()
                continue
            weight = rows(source, f"{old}{name}.weight", feature).view(copies_shape[0], -1)
            copies = grown_row.view(copies_shape).transpose(0, 1)
            check_copies(copies, weight, grown.dtype(f"{new}{name}.weight"))
        compared += 7
    return compared


def check_copies(copies: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Asserts that copies sum to the source's weight up to the last one's rounding, and differ by noise at 20 dB."""
    rounding = torch.finfo(dtype).eps / 2 * copies[-1].abs()
    assert ((copies.sum(0) - weight).abs() <= rounding).all()
    noise = copies - weight / len(copies)
    # The noise follows the whole tensor's magnitude, which all rows of this source share.
    assert 0.08 < (noise.norm() / (0.02 / len(copies) * noise.numel() ** 0.5)).item() < 0.12


def cpu_name() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Short hash of the checkout, or what the environment says where there is no repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("COMMIT", "unknown")


def save(path: Path, record: dict) -> None:
    """Put a row into the table in place of that of its dtype and layers; columns a kept row lacks stay empty."""

    def key(row: dict) -> tuple[str, int]:
        return row["dtype"], -int(row["source_layers"])

    rows = [record]
    if path.is_file():
        with path.open(newline="") as table:
            rows += [row for row in csv.DictReader(table) if key(row) != key(record)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as table:
        writer = csv.DictWriter(table, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(sorted(rows, key=key))


def main(argv: list[str] | None = None) -> None:
    """Entry point; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, created; its files are deleted")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="stored dtype")
    parser.add_argument("--layers", type=int, default=PUBLISHED_LAYERS, help="blocks of the source, a multiple of 4")
    parser.add_argument("--verify_tokens", default="16", help="tokens of the comparison in float64")
    arguments = parser.parse_args(argv)
    source, output = arguments.folder / "source", arguments.folder / "grown"
    try:
        write_source(source, getattr(torch, arguments.dtype), small_config(arguments.layers))
        print(f"source written, {sum(file.stat().st_size for file in source.iterdir()):,} bytes", flush=True)
        first_seconds, first_peak = run_growth(source, output, interrupt_after_shards=2)
        finished = {file: file.stat().st_mtime_ns for file in output.glob("*.safetensors")}
        second_seconds, second_peak = run_growth(source, output)
        assert {file: file.stat().st_mtime_ns for file in finished} == finished, "a finished shard was redone"
        manifest = json.loads((output / MANIFEST).read_text())
        for file, entry in manifest["shards"].items():
            assert file_sha256(output / file) == entry["sha256"], file
        rows = check_tensors(CheckpointReader(source), CheckpointReader(output), arguments.layers)
        verify_seconds, verify_peak = run_growth(
            source, output, "--verify", "--verify_tokens", arguments.verify_tokens
        )
        peak = max(first_peak, second_peak)
        record = {
            "dtype": arguments.dtype,
            "source_layers": arguments.layers,
            "device": f"{cpu_name()}, {os.cpu_count()} cores, 1 thread",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "commit": commit(),
            "bytes_written": sum(entry["bytes"] for entry in manifest["shards"].values()),
            "shards": len(manifest["shards"]),
            "shards_before_the_interruption": len(finished),
            "grow_seconds": round(first_seconds + second_seconds),
            "grow_peak_bytes": peak,
            "verify_seconds": round(verify_seconds),
            "verify_peak_bytes": verify_peak,
            "verdict": log_path(output).read_text().splitlines()[-1],
            "rows_compared": rows,
        }
        save(RESULTS / "growth_full_size.csv", record)
        print(log_path(output).read_text(), json.dumps(record, indent=2), sep="\n")
        assert max(peak, verify_peak) < MEMORY_LIMIT_BYTES
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
