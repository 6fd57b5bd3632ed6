"""One run of an experiment: trained by `run_pretraining`, then measured. Everything here needs torch."""

import gc
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experiments.curves import curve, read_steps, summarise
from benchmarks.experiments.grown import grown_start
from benchmarks.experiments.recall import measure_recall
from benchmarks.experiments.recipe import DESCRIPTION, DIVERGED, DONE, METRICS, RECALL, Run
from benchmarks.experiments.softmax_attention import SoftmaxConfig, SoftmaxForCausalLM, softmax_config
from modeling_motif2 import Motif2Config
from modeling_motif2.diagnostics import attention_statistics
from trainer.assemble import open_heldout
from trainer.config import PretrainConfig
from trainer.flops import flops_per_token
from trainer.loop import run_pretraining
from trainer.model import load_tokenizer, model_config
from trainer.step import NonFiniteLossError

# How a run computes, which changes its results by rounding only and is no part of its key: all matrices orthogonalised
# at once, in as few launches as there are shapes.
EXECUTION = {"muon_chunk_size": None}


def train(run: Run, data: Path, folder: Path) -> dict:
    """Train and measure.

    Args:
        run: what to train.
        data: folder with `tokenizer` and `shards`.
        folder: for the run's files; deleted afterwards, and before if an earlier attempt left it.

    Returns:
        dict: the run's line of runs.csv; and `curve`, a list of (tokens, measure, value).
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    record = {"key": run.key, "arm": run.arm, "seed": run.seed, "learning_rate": run.settings["learning_rate"]}
    settings = (
        run.settings
        | EXECUTION
        | {
            "output_dir": str(folder),
            "tokenizer": str(data / "tokenizer"),
            "data_dir": str(data / "shards"),
        }
    )
    config = PretrainConfig(**settings)
    record |= describe_model(config, run)
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record["torch"] = torch.__version__
    (folder / DESCRIPTION).write_text(json.dumps(record))
    status = DONE
    try:
        start, before = saved_start(run, config, folder)
        record |= before
        result = run_pretraining(PretrainConfig(**settings | {"model_name_or_path": start and str(start)}))
        record |= measure(result.model_dir, config, run)
    except NonFiniteLossError as error:
        status = DIVERGED
        print(f"{run.name} diverged: {error}", flush=True)
    steps = read_steps(folder / METRICS)
    record |= {"status": status, "seconds": round(time.monotonic() - started, 1)} | summarise(steps)
    if torch.cuda.is_available():
        record["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
    record["curve"] = curve(steps)
    shutil.rmtree(folder, ignore_errors=True)
    if config.compile_layers:  # shapes of this model would make the next one's programs more general, and slower
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def saved_start(run: Run, config: PretrainConfig, folder: Path) -> tuple[Path | None, dict]:
    """The model of a control or a grown run, saved to be continued from, else None; and what it cost."""
    if run.growing:
        return grown_start(run, config, folder)
    if run.attention == "motif2":
        return None, {}
    set_seed(run.seed)
    SoftmaxForCausalLM(run_architecture(config, run)).save_pretrained(folder / "start")
    return folder / "start", {}


def run_architecture(config: PretrainConfig, run: Run) -> Motif2Config:
    """Configuration of the run's model."""
    architecture = model_config(config, load_tokenizer(config.tokenizer))
    if run.attention == "motif2":
        return architecture
    return softmax_config(architecture, norm_output=run.attention == "softmax_norm")


def describe_model(config: PretrainConfig, run: Run) -> dict:
    """Parameters, and training FLOPs a token of a row that is one document."""
    architecture = run_architecture(config, run)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    flops = flops_per_token(architecture, config.sequence_length)
    if isinstance(architecture, SoftmaxConfig):
        flops = softmax_flops(architecture, config.sequence_length)
    return {"parameters": model.num_parameters(), "flops_per_token": round(flops)}


def softmax_flops(architecture: SoftmaxConfig, length: int) -> float:
    """As `flops_per_token`, for standard attention: 12 D a query head and visible pair."""
    hidden, dim, layers = architecture.hidden_size, architecture.head_dim, architecture.num_hidden_layers
    heads, keys = architecture.num_attention_heads, architecture.num_key_value_heads
    layer = hidden * dim * 2 * (heads + keys) + 3 * hidden * architecture.intermediate_size
    weights = layers * layer + architecture.vocab_size * hidden
    return 6 * weights + 12 * heads * dim * layers * (length + 1) / 2


def measure(model_dir: Path, config: PretrainConfig, run: Run) -> dict:
    """What the finished model does with held-out text: recall, lambda, noise share, maximum logits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model = model.to(device).eval()
    found = {}
    if run.attention == "motif2":
        heldout = open_heldout(config, AutoTokenizer.from_pretrained(model_dir))
        batch = next(iter(heldout.values()))[0]
        rows = {name: batch[name][:8].to(device) for name in ("input_ids", "position_ids")}
        layers = attention_statistics(model, use_cache=False, **rows)
        found = {
            "lambda": statistics.mean(layer.lambda_value for layer in layers),
            "noise_share": statistics.mean(layer.noise_share for layer in layers),
            "heldout_max_logit": max(float(layer.max_logits.max()) for layer in layers),
        }
    if RECALL in config.domains:
        found |= measure_recall(model, config.data_dir)
    return found
