"""One run of an experiment: trained by `run_pretraining`, then measured. Everything here needs torch."""

import gc
import shutil
import statistics
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_motif2  # noqa: F401  registers the model with the Auto classes
from benchmarks.experiments.recall import measure_recall
from benchmarks.experiments.recipe import DIVERGED, RECALL, Run
from benchmarks.experiments.softmax_attention import SoftmaxConfig, SoftmaxForCausalLM, softmax_config
from modeling_motif2.diagnostics import attention_statistics
from trainer.assemble import open_heldout
from trainer.config import PretrainConfig
from trainer.flops import flops_per_token
from trainer.loop import run_pretraining
from trainer.model import load_tokenizer, model_config
from trainer.plots import read_metrics
from trainer.step import NonFiniteLossError

CURVE_POINTS = 40  # of the measures that every step has


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
    started = time.monotonic()
    record = {"key": run.key, "arm": run.arm, "seed": run.seed, "learning_rate": run.settings["learning_rate"]}
    config = run_config(run, data, folder)
    record |= describe_model(config, run)
    status = "done"
    try:
        result = run_pretraining(config)
        record |= measure(result.model_dir, config, run)
    except NonFiniteLossError as error:
        status = DIVERGED
        print(f"{run.name} diverged: {error}", flush=True)
    steps = read_metrics(folder / "metrics.jsonl")
    record |= {"status": status, "seconds": round(time.monotonic() - started, 1)} | summarise(steps)
    record["curve"] = curve(steps)
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record["torch"] = torch.__version__
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def run_config(run: Run, data: Path, folder: Path) -> PretrainConfig:
    """Settings of a run; for standard attention its new model is saved first, to be continued from."""
    settings = run.settings | {
        "output_dir": str(folder),
        "tokenizer": str(data / "tokenizer"),
        "data_dir": str(data / "shards"),
    }
    config = PretrainConfig(**settings)
    if run.attention == "motif2":
        return config
    set_seed(run.seed)
    model = SoftmaxForCausalLM(softmax_config(model_config(config, load_tokenizer(config.tokenizer))))
    model.save_pretrained(folder / "start")
    return PretrainConfig(**settings | {"model_name_or_path": str(folder / "start")})


def describe_model(config: PretrainConfig, run: Run) -> dict:
    """Parameters, and training FLOPs a token of a row that is one document."""
    architecture = model_config(config, AutoTokenizer.from_pretrained(config.tokenizer))
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


def summarise(steps: list[dict]) -> dict:
    """Final and extreme values of a run's metrics."""
    evaluations = [row for row in steps if "eval" in row]
    training = [row for row in steps if "loss" in row]
    found = {"tokens": training[-1]["tokens"] if training else 0, "steps": len(training)}
    if training:
        found["tokens_per_second"] = round(statistics.median(row["tokens_per_second"] for row in training))
        found["clipped_heads"] = sum(row["clipped_heads"] for row in training)
        found["clipped_steps"] = sum(row["clipped_heads"] > 0 for row in training)
        logits = [max_logit for row in training if (max_logit := _exact_logit(row)) is not None]
        if logits:
            found |= {"max_logit": max(logits), "last_max_logit": logits[-1]}
    if len(evaluations) > 1:
        losses = evaluations[-1]["eval"]
        text = [name for name in losses if name != RECALL] or list(losses)
        found["heldout_mean"] = statistics.mean(losses[name] for name in text)
        for name, loss in losses.items():
            found[f"heldout_{name}"] = loss
            found[f"forgotten_{name}"] = loss - min(row["eval"][name] for row in evaluations)
    return found


def curve(steps: list[dict]) -> list[tuple[int, str, float]]:
    """Held-out losses of every evaluation; training loss and exact maximum logits, thinned."""
    points = []
    training = [row for row in steps if "loss" in row]
    exact = [row for row in training if _exact_logit(row) is not None]
    for row in training[:: -(-len(training) // CURVE_POINTS) or 1]:
        points.append((row["tokens"], "train_loss", row["loss"]))
    for row in exact[:: -(-len(exact) // CURVE_POINTS) or 1]:
        points.append((row["tokens"], "max_logit", _exact_logit(row)))
    for row in steps:
        if "eval" in row:
            text = [loss for name, loss in row["eval"].items() if name != RECALL] or list(row["eval"].values())
            points += [(row["tokens"], f"heldout_{name}", loss) for name, loss in row["eval"].items()]
            points.append((row["tokens"], "heldout_mean", statistics.mean(text)))
    return [(tokens, measure, float(f"{value:.5g}")) for tokens, measure, value in points if value is not None]


def _exact_logit(row: dict) -> float | None:
    """Largest attention logit of a step that took them exactly, else None."""
    logits = [logit for logit in row.get("max_logits") or [] if logit is not None]
    return max(logits) if logits and row.get("max_logits_exact") else None


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
