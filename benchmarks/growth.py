"""Does growing help? Trains a small model, the model grown from it, and the large shape from scratch.

    python benchmarks/growth.py --prepare ../data/pretrain         tokenise text into the recipe's data_dir, on a CPU
    python benchmarks/growth.py --config recipes/experiments/growth.yaml        train; needs an accelerator
    python benchmarks/growth.py --plot benchmarks/results/growth.csv docs/experiments/growth.png

The large runs see the same batches for the same number of tokens. Held-out loss goes to growth.csv; settings, speeds
and the error of growth go to growth.json; both lie in $OUT, or in benchmarks/results/ when that is unset.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_motif2 import Motif2Config  # noqa: E402
from modeling_motif2.growth import GrowthOptions, grow  # noqa: E402
from trainer.config import MODEL_FIELDS, PretrainConfig  # noqa: E402
from trainer.data.corpus import Source, read_documents  # noqa: E402
from trainer.data.shards import build_shards  # noqa: E402
from trainer.data.tokenizer import train_tokenizer  # noqa: E402
from trainer.flops import count_parameters, flops_per_token  # noqa: E402
from trainer.loop import run_pretraining  # noqa: E402
from trainer.plots import read_metrics  # noqa: E402

RESULTS = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
RECIPE = ROOT / "recipes" / "experiments" / "growth.yaml"
FIELDS = ("run", "step", "tokens", "training_flops", "domain", "heldout_loss")
VOCAB_SIZE = 16384
# Of the documents of each domain, the share that a hash of their text takes into the experiment, and how many are held
# out of those (assumption): about 17 million tokens, 34 MB as 16-bit numbers.
TAKEN = {"general": 0.40, "stem": 0.35, "math": 0.26, "code": 0.13}
HELDOUT_FRACTION = 0.03
TOKENIZER_BYTES = 12_000_000
# What a run costs beside its steps: start, evaluation before the first step, export (assumption).
OVERHEAD_SECONDS = 12.0
CALIBRATION_STEPS = 12
LABELS = {"small": "small model", "scratch": "large from scratch"}


@dataclass
class Experiment:
    """A recipe of the experiment.

    Args:
        data_dir: holds `tokenizer` and `shards`, from `--prepare`.
        output_dir: gets a folder a run.
        seconds_limit: of the whole experiment; token budgets shrink by one common factor so that all runs fit.
        warmup_share, decay_share: parts of a run's tokens in which the learning rate rises and falls.
        pretrain: settings of every run.
        small: shape, tokens and learning rates of the small model.
        growth: settings of `motif2-grow`.
        large: tokens and learning rates of the large runs.
        noise_snr_db: a grown run for each; None is without noise.

    Raises:
        ValueError: the large runs would set a shape of their own, or a number is out of range.
    """

    data_dir: str
    output_dir: str
    seconds_limit: float
    warmup_share: float
    decay_share: float
    pretrain: dict
    small: dict
    growth: dict
    large: dict
    noise_snr_db: list[float | None]

    def __post_init__(self):
        shape = sorted(set(MODEL_FIELDS) & set(self.large))
        if shape:
            raise ValueError(f"large sets {shape}: its shape follows from small and growth, leave them out")
        if not self.seconds_limit > 0 or not 0 <= self.warmup_share + self.decay_share <= 1:
            raise ValueError(
                f"seconds_limit={self.seconds_limit}, warmup_share={self.warmup_share} and decay_share="
                f"{self.decay_share}: the first must be above 0, the shares together at most 1"
            )

    @classmethod
    def read(cls, path: str | Path) -> "Experiment":
        """Reads a recipe.

        Raises:
            ValueError: a key is unknown or missing.
        """
        recipe = yaml.safe_load(Path(path).read_text())
        known = {field.name for field in fields(cls)}
        if set(recipe) != known:
            raise ValueError(f"{path}: unknown {sorted(set(recipe) - known)}, missing {sorted(known - set(recipe))}")
        return cls(**recipe)

    def run_config(self, name: str, settings: dict, total_tokens: int | None = None) -> PretrainConfig:
        """Settings of one run; its tokens are whole steps."""
        batch = self.pretrain["batch_tokens"]
        total = max(1, (total_tokens or settings["total_tokens"]) // batch) * batch
        return PretrainConfig(
            **self.pretrain
            | settings
            | {
                "output_dir": str(Path(self.output_dir) / name),
                "overwrite": True,
                "tokenizer": str(Path(self.data_dir) / "tokenizer"),
                "data_dir": str(Path(self.data_dir) / "shards"),
                "verify_checksums": False,
                "checkpoint_steps": 0,
                "total_tokens": total,
                "warmup_tokens": int(self.warmup_share * total),
                "decay_tokens": int(self.decay_share * total),
            }
        )


def run_experiment(experiment: Experiment, results: Path) -> dict:
    """Train all models and write growth.csv and growth.json.

    Args:
        experiment: the recipe.
        results: folder of the two files.

    Returns:
        dict: what growth.json holds.
    """
    started = time.monotonic()
    speeds, large_shape = calibrate(experiment)
    scale = budget_scale(experiment, speeds, experiment.seconds_limit - (time.monotonic() - started))
    tokens = {name: int(scale * getattr(experiment, name)["total_tokens"]) for name in ("small", "large")}
    print(f"tokens a second {speeds}, budgets times {scale:.3f}: {tokens}")
    small_config = experiment.run_config("small", experiment.small, tokens["small"])
    small_run = run_pretraining(small_config)
    architecture = Motif2Config.from_pretrained(small_run.model_dir)
    length = experiment.pretrain["sequence_length"]
    small_flops = flops_per_token(architecture, length) * small_run.tokens
    rows = evaluation_rows("small", small_run.metrics_path, flops_per_token(architecture, length))
    summary = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "recipe": vars(experiment),
        "tokens_per_second": speeds,
        "budget_scale": scale,
        "runs": {"small": describe_run(architecture, small_run)},
    }
    for noise_snr_db in experiment.noise_snr_db:
        name = "grown" if noise_snr_db is None else f"grown_{noise_snr_db:g}dB"
        grown = Path(experiment.output_dir) / f"{name}_start"
        shutil.rmtree(grown, ignore_errors=True)
        options = GrowthOptions(
            str(small_run.model_dir), str(grown), verify=True, noise_snr_db=noise_snr_db, **experiment.growth
        )
        verification = grow(options).verification
        settings = experiment.large | {"model_name_or_path": str(grown)}
        run = run_pretraining(experiment.run_config(name, settings, tokens["large"]))
        architecture = Motif2Config.from_pretrained(run.model_dir)
        rows += evaluation_rows(name, run.metrics_path, flops_per_token(architecture, length), small_flops)
        summary["runs"][name] = describe_run(architecture, run) | {"growth_error_float64": verification.error}
        save(results, rows, summary)
    run = run_pretraining(experiment.run_config("scratch", experiment.large | large_shape, tokens["large"]))
    rows += evaluation_rows("scratch", run.metrics_path, flops_per_token(architecture, length))
    summary["runs"]["scratch"] = describe_run(architecture, run)
    save(results, rows, summary)
    return summary


def calibrate(experiment: Experiment) -> tuple[dict[str, float], dict]:
    """Tokens a second of both shapes over a few steps, and the large shape as fields of `PretrainConfig`."""
    speeds, steps = {}, CALIBRATION_STEPS * experiment.pretrain["batch_tokens"]
    still = {"learning_rate": 1e-9, "adamw_learning_rate": 1e-9, "eval_steps": 0, "progress": False}
    run = run_pretraining(experiment.run_config("calibrate_small", experiment.small | still, steps))
    speeds["small"] = median_speed(run.metrics_path)
    grown = Path(experiment.output_dir) / "calibrate_grown"
    shutil.rmtree(grown, ignore_errors=True)
    config = grow(GrowthOptions(str(run.model_dir), str(grown), **experiment.growth)).config
    shape = {name: getattr(config, name) for name in MODEL_FIELDS if name != "rope_theta"}
    shape["rope_theta"] = config.rope_parameters["rope_theta"]
    run = run_pretraining(experiment.run_config("calibrate_large", experiment.large | shape | still, steps))
    speeds["large"] = median_speed(run.metrics_path)
    return speeds, shape


def budget_scale(experiment: Experiment, speeds: dict[str, float], seconds_left: float) -> float:
    """The factor, at most 1, by which all token budgets shrink to fit into the seconds that are left."""
    num_large = 1 + len(experiment.noise_snr_db)
    pretrain = experiment.pretrain
    evaluated = pretrain["eval_tokens"] * len(pretrain["domains"])
    # An evaluated token costs a third of a trained one: forward only.
    per_step = 1 + evaluated / 3 / (pretrain["eval_steps"] * pretrain["batch_tokens"])
    seconds = experiment.small["total_tokens"] * per_step / speeds["small"]
    seconds += num_large * experiment.large["total_tokens"] * per_step / speeds["large"]
    return min(1.0, max(0.01, (seconds_left - (num_large + 1) * OVERHEAD_SECONDS) / seconds))


def median_speed(metrics_path: Path) -> float:
    """Median tokens a second of a run, its first four steps left out."""
    return statistics.median(row["tokens_per_second"] for row in read_metrics(metrics_path)[4:])


def evaluation_rows(name: str, metrics_path: Path, flops: float, flops_before: float = 0.0) -> list[dict]:
    """Rows of growth.csv from a run's evaluations; "mean" is over the domains."""
    rows = []
    for entry in read_metrics(metrics_path):
        if "eval" not in entry:
            continue
        losses = entry["eval"] | {"mean": statistics.mean(entry["eval"].values())}
        for domain, loss in losses.items():
            spent = flops_before + flops * entry["tokens"]
            rows.append(dict(zip(FIELDS, (name, entry["step"], entry["tokens"], spent, domain, loss), strict=True)))
    return rows


def describe_run(architecture: Motif2Config, run) -> dict:
    """What growth.json says about a run."""
    training = [row for row in read_metrics(run.metrics_path) if "loss" in row]
    return {
        "parameters": count_parameters(architecture)["total"],
        "steps": run.steps,
        "tokens": run.tokens,
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in training),
        "clipped_heads": sum(row["clipped_heads"] for row in training),
        "first_heldout": run.first_eval,
        "last_heldout": run.last_eval,
    }


def save(results: Path, rows: list[dict], summary: dict) -> None:
    """Write growth.csv and growth.json."""
    results.mkdir(parents=True, exist_ok=True)
    with open(results / "growth.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (results / "growth.json").write_text(json.dumps(summary, indent=2) + "\n")


def commit() -> str:
    """Short hash of the checkout, or what the environment says where there is no repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("COMMIT", "unknown")


def prepare(texts: Path, data_dir: Path) -> dict:
    """Tokenise part of a pre-training corpus, small enough to be carried to an accelerator.

    Args:
        texts: folder of `<domain>.jsonl.zst`.
        data_dir: gets `tokenizer` and `shards`.

    Returns:
        dict: the manifest of the shards.
    """
    budget = TOKENIZER_BYTES // len(TAKEN)
    tokenizer = train_tokenizer(
        (text for domain in TAKEN for text in first_bytes(taken_documents(texts, domain), budget)),
        VOCAB_SIZE,
        data_dir / "tokenizer",
    )
    domains = {domain: taken_documents(texts, domain) for domain in TAKEN}
    return build_shards(data_dir / "shards", domains, tokenizer, heldout_fraction=HELDOUT_FRACTION)


def taken_documents(texts: Path, domain: str) -> Iterator[dict]:
    """The documents of a domain whose hash falls into its share."""
    for document in read_documents(Source(str(texts / f"{domain}.jsonl.zst"))):
        digest = hashlib.sha256(b"growth:" + document["text"].encode("utf-8", "surrogatepass")).digest()
        if int.from_bytes(digest[:8], "big") < TAKEN[domain] * 2**64:
            yield document


def first_bytes(documents: Iterator[dict], limit: int) -> Iterator[str]:
    """Texts until `limit` bytes have been seen."""
    seen = 0
    for document in documents:
        if seen >= limit:
            return
        seen += len(document["text"].encode("utf-8", "surrogatepass"))
        yield document["text"]


def plot(csv_path: str | Path, picture: str | Path) -> None:
    """Draw the mean held-out loss of every run over its own tokens, and over all FLOPs spent on it.

    Args:
        csv_path: growth.csv.
        picture: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(csv_path) as file:
        rows = [row for row in csv.DictReader(file) if row["domain"] == "mean"]
    figure, panels = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained", sharey=True)
    colors = dict(zip(dict.fromkeys(row["run"] for row in rows), plt.get_cmap("tab10").colors, strict=False))
    columns = (
        ("tokens", 1e6, "millions of tokens of the run"),
        ("training_flops", 1e15, "10^15 FLOPs spent, the small model's included"),
    )
    for axes, (column, unit, xlabel) in zip(panels, columns, strict=True):
        for name, color in colors.items():
            points = [(float(row[column]) / unit, float(row["heldout_loss"])) for row in rows if row["run"] == name]
            style = "--" if name == "grown" else "-"
            axes.plot(*zip(*points, strict=True), style, color=color, label=label(name), marker=".", markersize=4)
        axes.set_xlabel(xlabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb")
    # The untrained models' loss would press everything else together.
    panels[0].set_ylim(top=1.02 * max(float(row["heldout_loss"]) for row in rows if int(row["step"]) > 0))
    panels[0].set_ylabel("mean held-out loss (nats a token)")
    panels[0].legend(frameon=False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def label(name: str) -> str:
    """A run's name in the legend."""
    if name.startswith("grown"):
        noise = name.removeprefix("grown").strip("_").removesuffix("dB")
        return f"grown, noise at {noise} dB" if noise else "grown, no noise"
    return LABELS[name]


def main(argv: list[str] | None = None) -> None:
    """Entry point; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(RECIPE), help="recipe of the experiment")
    parser.add_argument("--prepare", metavar="TEXTS", help="folder of <domain>.jsonl.zst to tokenise into data_dir")
    parser.add_argument("--plot", nargs=2, metavar=("CSV", "PNG"), help="draw a finished run")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        plot(*arguments.plot)
        return
    experiment = Experiment.read(arguments.config)
    if arguments.prepare:
        manifest = prepare(Path(arguments.prepare), Path(experiment.data_dir))
        for name, domain in manifest["domains"].items():
            print(f"{name:10} {domain['train']['tokens']:>12,} tokens, {domain['heldout']['tokens']:>9,} held out")
        return
    summary = run_experiment(experiment, RESULTS)
    for name, run in summary["runs"].items():
        losses = "  ".join(f"{domain} {loss:.3f}" for domain, loss in run["last_heldout"].items())
        print(f"{name:12} {run['parameters']:>12,} parameters {run['tokens']:>12,} tokens  {losses}")


if __name__ == "__main__":
    main()
