"""The experiment on growth: its recipe holds together, its picture is drawn, and in miniature it runs."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
import zstandard

from modeling_motif2 import Motif2Config
from modeling_motif2.growth import count_parameters
from modeling_motif2.growth_plan import Growth, schedule
from trainer.config import MODEL_FIELDS

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "experiments" / "growth.yaml"


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/growth.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("benchmark_growth", ROOT / "benchmarks" / "growth.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_grows_30_million_parameters_to_140(benchmark):
    experiment = benchmark.Experiment.read(RECIPE)
    shape = {name: value for name, value in experiment.small.items() if name in MODEL_FIELDS}
    small = Motif2Config(vocab_size=benchmark.VOCAB_SIZE, **shape)
    steps = dict(experiment.growth)
    layers = schedule(small.num_hidden_layers, steps.pop("insert_every"), None)
    growth = Growth(small, insert_after=layers, **steps)
    grown = Motif2Config.from_dict(small.to_dict() | growth.config_changes())
    assert 28e6 < count_parameters(small) < 32e6
    assert 130e6 < count_parameters(grown) < 150e6
    assert grown.num_signal_heads_per_group == 4
    for name in ("small", "large"):
        settings = getattr(experiment, name) | ({} if name == "small" else shape)
        config = experiment.run_config(name, settings, 1_000_000)
        assert config.total_tokens % config.batch_tokens == 0
        assert config.total_tokens <= 1_000_000
    assert set(experiment.pretrain["domains"]) == set(benchmark.TAKEN)


def test_budgets_shrink_together_to_fit_the_time(benchmark):
    experiment = benchmark.Experiment.read(RECIPE)
    assert benchmark.budget_scale(experiment, {"small": 1e7, "large": 1e7}, 440) == 1
    slow = benchmark.budget_scale(experiment, {"small": 1e5, "large": 5e4}, 440)
    seconds = slow * (experiment.small["total_tokens"] / 1e5 + 3 * experiment.large["total_tokens"] / 5e4)
    assert 0.3 * 440 < seconds < 440


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smal": {}}, r"unknown \['smal'\]"),
        ({"large": {"hidden_size": 4}}, r"large sets \['hidden_size'\]"),
        ({"seconds_limit": 0}, "must be above 0"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused(benchmark, tmp_path, change, message):
    recipe = yaml.safe_load(RECIPE.read_text()) | change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=message):
        benchmark.Experiment.read(tmp_path / "recipe.yaml")


def test_the_picture_is_drawn_from_the_csv(benchmark, tmp_path):
    with open(tmp_path / "growth.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(benchmark.FIELDS)
        for run in ("small", "grown", "grown_20dB", "scratch"):
            writer.writerows((run, step, step * 1e6, step * 1e15, "mean", 9 - step) for step in range(4))
    benchmark.main(["--plot", str(tmp_path / "growth.csv"), str(tmp_path / "growth.png")])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert benchmark.label("grown_20dB") == "grown, noise at 20 dB"
    assert benchmark.label("grown") == "grown, no noise"


def test_the_document_tells_what_the_table_holds():
    """Each row of "What was seen" against growth.csv and growth.json, and of "Full size" against its table."""
    text = (ROOT / "docs" / "experiments" / "growth.md").read_text()
    results = ROOT / "benchmarks" / "results"
    runs = json.loads((results / "growth.json").read_text())["runs"]
    with open(results / "growth.csv") as file:
        losses = {(row["run"], int(row["step"]), row["domain"]): row for row in csv.DictReader(file)}
    labels = {
        "small, at its end": "small",
        "grown, noise at 20 dB": "grown_20dB",
        "grown, no noise": "grown",
        "from scratch": "scratch",
    }
    for label, run in labels.items():
        cells = next(line for line in text.splitlines() if line.startswith(f"| {label} |")).replace("*", "").split("|")
        steps, tokens = runs[run]["steps"], runs[run]["tokens"]
        expected = [f"{runs[run]['parameters'] / 1e6:.1f}M", f"{tokens / 1e6:.1f}M"]
        for domain in ("general", "stem", "math", "code", "mean"):
            row = losses[run, steps, domain]
            assert int(row["tokens"]) == tokens
            expected.append(f"{float(row['heldout_loss']):.3f}")
        assert [cell.strip() for cell in cells[2:-1]] == expected
    with open(results / "growth_full_size.csv") as file:
        for row in csv.DictReader(file):
            expected = [f"{int(row['bytes_written']) / 1e9:.1f} GB"]
            for part in ("grow", "verify"):
                expected += [f"{int(row[f'{part}_seconds']):,} s", f"{int(row[f'{part}_peak_bytes']) / 2**30:.2f} GiB"]
            cells = [row["dtype"], row["source_layers"], *expected, row["commit"]]
            assert f"| {' | '.join(cells)} |" in text


@pytest.mark.slow
def test_the_experiment_runs_in_miniature(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", 320)
    monkeypatch.setattr(benchmark, "TAKEN", {"general": 1.0, "code": 1.0})
    monkeypatch.setattr(benchmark, "HELDOUT_FRACTION", 0.2)
    (tmp_path / "texts").mkdir()
    for domain, word in (("general", "cat"), ("code", "def")):
        lines = "".join(json.dumps({"text": f"{word} {i} " * 20}) + "\n" for i in range(60))
        (tmp_path / "texts" / f"{domain}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    benchmark.prepare(tmp_path / "texts", tmp_path / "data")
    recipe = yaml.safe_load(RECIPE.read_text())
    share = {"start": 0.5, "end": 0.5}
    recipe["pretrain"] |= {
        "domains": {"general": share, "code": share},
        "sequence_length": 64,
        "batch_tokens": 256,
        "micro_batch_tokens": 128,
        "mixed_precision": "no",
        "eval_steps": 5,
        "eval_tokens": 512,
    }
    recipe["small"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    recipe["small"] |= {"num_attention_heads": 4, "num_key_value_heads": 4, "total_tokens": 256 * 30}
    recipe["growth"]["insert_every"] = 2
    recipe["large"]["total_tokens"] = 256 * 10
    experiment = benchmark.Experiment(
        **recipe | {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "runs"), "seconds_limit": 600}
    )
    summary = benchmark.run_experiment(experiment, tmp_path / "results")
    runs = summary["runs"]
    assert set(runs) == {"small", "grown_20dB", "grown", "scratch"}
    for name in ("grown", "grown_20dB"):
        assert runs[name]["growth_error_float64"] < 1e-6
        assert runs[name]["parameters"] == runs["scratch"]["parameters"] > 2 * runs["small"]["parameters"]
        for domain, loss in runs[name]["first_heldout"].items():
            assert loss == pytest.approx(runs["small"]["last_heldout"][domain], rel=1e-5)
    with open(tmp_path / "results" / "growth.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == set(runs)
    spent = {run: float(next(row["training_flops"] for row in rows if row["run"] == run)) for run in runs}
    assert spent["scratch"] == 0 < spent["grown"]
    assert json.loads((tmp_path / "results" / "growth.json").read_text())["budget_scale"] == 1
