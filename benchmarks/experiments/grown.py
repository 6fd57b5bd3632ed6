"""The start of a grown run: a small model is trained, and grown to the run's shape."""

import statistics
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from benchmarks.experiments.recipe import Run
from modeling_motif2 import Motif2Config
from modeling_motif2.growth import grow
from modeling_motif2.growth_options import GrowthOptions
from modeling_motif2.growth_plan import Growth, schedule
from trainer.config import PretrainConfig
from trainer.flops import flops_per_token
from trainer.loop import run_pretraining

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COMPENSATED = ("subln.weight", "lambda_q2", "lambda_k2")


def grown_start(run: Run, target: PretrainConfig, folder: Path) -> tuple[Path, dict]:
    """Train the run's small model and grow it.

    Args:
        run: with `source`, settings of the small model, and `growing`.
        target: settings of the run.
        folder: for the small model and the grown one.

    Returns:
        tuple: folder of the grown model; and what the small one cost and came to, for the run's record.

    Raises:
        NonFiniteLossError: the small model diverged.
        ValueError: the grown model has another shape than the run.
    """
    same = {name: getattr(target, name) for name in ("tokenizer", "data_dir", "muon_chunk_size")}
    config = PretrainConfig(**run.source | same | {"output_dir": str(folder / "source")})
    result = run_pretraining(config)
    architecture = AutoConfig.from_pretrained(result.model_dir)
    growing = run.growing
    ratio = target.num_attention_heads // target.num_noise_heads - 1
    options = {"insert_every": growing.insert_every}
    if growing.width > 1 or ratio > architecture.num_signal_heads_per_group:
        options |= {"width": growing.width, "signal_ratio": ratio, "noise_snr_db": growing.noise_snr_db}
        options["seed"] = 0 if growing.noise_snr_db is None else run.seed
    start = folder / "start"
    grown = grow(GrowthOptions(str(result.model_dir), str(start), **options)).config
    if different := [name for name in SHAPE if getattr(grown, name) != getattr(target, name)]:
        raise ValueError(f"{run.name}: the grown model differs from the run in {different}")
    if not growing.compensated:
        undo_compensation(result.model_dir, start, architecture, growing.insert_every)
    last = result.last_eval
    found = {
        "source_tokens": result.tokens,
        "source_flops": flops_per_token(architecture, config.sequence_length) * result.tokens,
        "source_heldout_mean": statistics.mean(last.values()),
    }
    return start, found


def undo_compensation(source: Path, grown: Path, architecture: Motif2Config, insert_every: int) -> None:
    """Give every block of a deeper model the vectors of its parent, as if its index did not set lambda_init."""
    inserted = schedule(architecture.num_hidden_layers, insert_every, None)
    parents = [block.source for block in Growth(architecture, insert_after=inserted).blocks]
    (before,) = (load_file(file) for file in source.glob("*.safetensors"))
    (file,) = grown.glob("*.safetensors")
    after = load_file(file)
    for index, parent in enumerate(parents):
        for name in COMPENSATED:
            own = f"model.layers.{index}.self_attn.{name}"
            after[own] = before[f"model.layers.{parent}.self_attn.{name}"].to(after[own].dtype, copy=True)
    save_file(after, file, {"format": "pt"})
