"""The experiments: recipes, the order of runs, intervals, the recall task, and standard attention as the control."""

import csv
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zstandard
from transformers import AutoModelForCausalLM

from benchmarks.experiments import __main__ as entry
from benchmarks.experiments import sharing
from benchmarks.experiments.curves import summarise
from benchmarks.experiments.data import prepare_data
from benchmarks.experiments.figure import arm_curves
from benchmarks.experiments.grown import undo_compensation
from benchmarks.experiments.pool import Pool, Worker
from benchmarks.experiments.recall import measure_recall, recall_documents
from benchmarks.experiments.recipe import CUT, DIVERGED, Growing, Recipe
from benchmarks.experiments.report import chosen_runs, crossing, interval, lengths, report, spent_to_equal
from benchmarks.experiments.results import Results
from benchmarks.experiments.softmax_attention import SoftmaxConfig, SoftmaxForCausalLM, softmax_config
from benchmarks.experiments.training import softmax_flops
from benchmarks.experiments.whole_text import make_whole_text
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from modeling_motif2.growth import grow
from modeling_motif2.growth_options import GrowthOptions
from trainer.config import PretrainConfig
from trainer.data.shards import TokenCorpus, build_shards
from trainer.data.tokenizer import train_tokenizer
from trainer.execution import compile_layers
from trainer.flops import flops_per_token
from trainer.model import model_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(set((ROOT / "recipes" / "experiments").glob("*.yaml")) - {ROOT / "recipes/experiments/growth.yaml"})
VOCABULARY = 16384
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 4,
    "num_noise_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_arms_have_what_must_be_equal_within_bounds(path):
    recipe = Recipe.read(path)
    sizes = []
    for arm in recipe.arms:
        run = recipe.run(arm, 0, recipe.seeds[0])
        folders = {"tokenizer": "t", "data_dir": "d", "output_dir": "o", "vocab_size": VOCABULARY}
        config = PretrainConfig(**run.settings, **folders)
        architecture = model_config(config)
        length = config.sequence_length
        flops = flops_per_token(architecture, length)
        if run.attention != "motif2":
            architecture = softmax_config(architecture, norm_output=run.attention == "softmax_norm")
            flops = softmax_flops(architecture, length)
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(architecture).num_parameters()
        sizes.append({"parameters": parameters, "flops": flops}[recipe.same or "parameters"])
        assert config.total_tokens % config.batch_tokens == 0
        assert 8e6 < parameters < 30e6
    assert max(sizes) / min(sizes) - 1 <= recipe.within
    assert (ROOT / recipe.page).is_file()


def make_recipe(**changes) -> Recipe:
    settings = {
        "name": "example",
        "page": "page.md",
        "question": "?",
        "data_dir": "data",
        "seeds": [0, 1, 2],
        "pretrain": {"total_tokens": 1000, "batch_tokens": 100, "num_hidden_layers": 2, "domains": {}},
        "arms": {"a": {"label": "A"}, "b": {"label": "B", "sweep": [{"learning_rate": 5.0}]}},
        "sweep": [{"learning_rate": 1.0}, {"learning_rate": 2.0}],
        "measures": ["heldout_mean"],
    }
    return Recipe(**settings | changes)


def record(recipe: Recipe, arm: str, point: int, seed: int, loss: float, status: str = "done") -> dict:
    run = recipe.run(arm, point, seed)
    return {
        **{"key": run.key, "arm": arm, "seed": seed, "learning_rate": run.settings["learning_rate"]},
        **{"status": status, "heldout_mean": loss, "parameters": 10, "flops_per_token": 60, "tokens": 1000},
        **{
            "seconds": 1,
            "device": "cpu",
            "torch": "2",
            "commit": "c",
            "tokens_per_second": 9,
            "workers_per_device": 1,
        },
        "curve": [(0, "heldout_mean", 9.0), (500, "heldout_mean", loss + 1), (1000, "heldout_mean", loss)],
    }


def names(runs) -> list[tuple]:
    return [(run.arm, run.point, run.seed) for run in runs]


def test_other_seeds_follow_at_the_best_learning_rate():
    recipe = make_recipe()
    sweep = [("a", 0, 0), ("b", 0, 0), ("a", 1, 0)]
    assert names(recipe.runs({})) == [*sweep, ("b", 0, 1), ("b", 0, 2)]
    records = {run["key"]: run for run in (record(recipe, "a", 0, 0, 3.0), record(recipe, "a", 1, 0, 2.0))}
    assert names(recipe.runs(records)) == [*sweep, ("a", 1, 1), ("b", 0, 1), ("a", 1, 2), ("b", 0, 2)]
    both = [*sweep, ("a", 1, 1), ("b", 0, 1), ("a", 1, 2), ("b", 0, 2), ("a", 0, 1), ("a", 0, 2)]
    assert names(make_recipe(all_rates=True).runs(records)) == both
    diverged = {run["key"]: run for run in (record(recipe, "a", 0, 0, 3.0), record(recipe, "a", 1, 0, 2.0, DIVERGED))}
    assert names(recipe.runs(diverged)) == [*sweep, ("a", 0, 1), ("b", 0, 1), ("a", 0, 2), ("b", 0, 2)]


def test_seeds_go_before_other_rates_where_asked():
    arms = {"a": {"label": "A"}, "b": {"label": "B", "sweep": [{"learning_rate": 5.0}], "turn": 1}}
    recipe = make_recipe(seeds_first=True, arms=arms)
    first = [("a", 0, 0), ("b", 0, 0), ("a", 0, 1), ("b", 0, 1), ("a", 0, 2), ("b", 0, 2)]
    assert names(recipe.runs({})) == [*first, ("a", 1, 0)]
    records = {run["key"]: run for run in (record(recipe, "a", 0, 0, 3.0), record(recipe, "a", 1, 0, 2.0))}
    runs = recipe.runs(records)
    assert names(runs) == [*first, ("a", 1, 0), ("a", 1, 1), ("a", 1, 2)]
    assert [run.turn for run in runs] == [0, 1] * 3 + [2, 3, 3]
    assert runs[6].key == recipe.run("a", 1, 0).key


def test_a_run_finished_for_another_recipe_is_not_made_again(tmp_path):
    """Only `a` has the other's settings; its sweep is finished there, and of the seeds that follow from it one."""
    recipe, other = make_recipe(), make_recipe(name="other", arms={"z": {"label": "Z"}})
    results, elsewhere = Results(tmp_path / "example"), Results(tmp_path / "other")
    for point, seed in ((0, 0), (1, 0), (1, 2)):
        elsewhere.add(record(other, "z", point, seed, 3.0 - point))
    results.adopt(recipe.runs, [elsewhere])
    assert {(row["arm"], row["seed"], row["learning_rate"]) for row in results.finished.values()} == {
        ("a", 0, 1.0),
        ("a", 0, 2.0),
        ("a", 2, 2.0),
    }
    assert results.curves == elsewhere.curves


def test_runs_differ_in_key_by_arm_rate_and_seed_only():
    recipe = make_recipe()
    keys = [run.key for run in recipe.runs({})]
    assert len(set(keys)) == len(keys)
    assert recipe.run("a", 0, 0).key == make_recipe(name="other").run("a", 0, 0).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {}}}, "needs label"),
        ({"arms": {"a": {"label": 241}}}, "put it in quotes"),
        ({"arms": {"a": {"label": "A", "attention": "linear"}}}, "'linear': choose one of"),
        ({"arms": {"a": {"label": "A", "against": ["z"]}}}, "name some of"),
        ({"same": "memory"}, "'memory': write parameters"),
        ({"seeds": []}, "must each have an entry"),
        ({"decay_share": 1.5}, "use shares below 1"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**changes)


def test_a_setting_that_the_trainer_does_not_know_is_refused_at_once(tmp_path):
    text = (ROOT / "recipes" / "experiments" / "annealing.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("  eval_tokens:", "  eval_token:"))
    with pytest.raises(ValueError, match=r"arm 'equal' has settings that do not fit: .*'eval_token'"):
        Recipe.read(tmp_path / "wrong.yaml")


def test_shape_and_length_of_the_small_model_follow_from_the_large_one():
    recipe = Recipe.read(ROOT / "recipes" / "experiments" / "growth_ways.yaml")
    run = recipe.run("both", 0, 2)
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [run.source[name] for name in shape] == [128, 512, 3, 4, 4]
    assert run.source["total_tokens"] == run.settings["total_tokens"] // 2
    assert (run.source["seed"], run.settings["seed"]) == (1002, 2)
    assert run.source["learning_rate"] == run.settings["learning_rate"]
    assert run.source["decay_tokens"] == int(0.3 * run.source["total_tokens"])
    assert len({recipe.run(arm, 0, 0).key for arm in recipe.arms}) == len(recipe.arms)
    with pytest.raises(ValueError, match="no number of layers becomes 5 with insert_every 1"):
        Growing(source_share=0.5, insert_every=1).source_shape(run.settings | {"num_hidden_layers": 5})
    with pytest.raises(ValueError, match="width 3 does not divide"):
        Growing(source_share=0.5, width=3).source_shape(run.settings)


def test_without_compensation_a_deeper_model_computes_something_else(tmp_path):
    torch.manual_seed(0)
    model = Motif2ForCausalLM(Motif2Config(**SHAPE)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "small")
    ids = torch.arange(24).view(2, 12)
    differences = []
    for compensated in (True, False):
        grown = tmp_path / f"grown_{compensated}"
        grow(GrowthOptions(str(tmp_path / "small"), str(grown), insert_every=1))
        if not compensated:
            undo_compensation(tmp_path / "small", grown, model.config, 1)
        with torch.no_grad():
            logits = Motif2ForCausalLM.from_pretrained(grown).eval()(ids).logits
            differences.append(float((logits - model(ids).logits).abs().max()))
    assert differences[0] < 1e-4 < 1e-2 < differences[1]


def test_compute_to_equal_counts_the_small_model(tmp_path):
    recipe = make_recipe(sweep=[{"learning_rate": 1.0}])
    results = Results(tmp_path)
    for arm, loss, cost in (("a", 3.0, {}), ("b", 2.0, {"source_flops": 30_000.0})):
        results.add(record(recipe, arm, 0, 0, loss) | cost)
    own, baseline = ({0: results.records[recipe.run(arm, 0, 0).key]} for arm in "ba")
    assert spent_to_equal(own, baseline, results) == "0.5000"
    assert spent_to_equal(own, baseline, results, compute=True) == "1.0000"


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(interval([5.0])[1])


def test_a_curve_crosses_a_level_between_its_points():
    curve = [(0, 10.0), (100, 6.0), (200, 4.0)]
    assert crossing(curve, 5.0) == 150
    assert crossing(curve, 8.0) == 50
    assert crossing(curve, 3.0) is None
    assert crossing(curve, 11.0) == 0


def test_report_pairs_runs_by_seed_and_fills_the_page(tmp_path):
    recipe = make_recipe(sweep=[{"learning_rate": 1.0}])
    results = Results(tmp_path)
    for seed, base in enumerate((2.0, 3.0, 4.0)):
        results.add(record(recipe, "a", 0, seed, base))
        results.add(record(recipe, "b", 0, seed, base - 0.5 + 0.01 * seed))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results: example -->old<!-- end of results: example -->\nafter\n")
    text = report(recipe, Results(tmp_path), tmp_path)
    half = 4.303 * 0.01 / math.sqrt(3)
    assert f"**B** against A: loss, mean: better by 0.4900 ({-0.49 - half:+.4f} to {-0.49 + half:+.4f})." in text
    assert "| loss, mean | 3.0000 ± 2.4843 | 2.5100 ± 2.5092 |" in text
    assert page.read_text() == f"before\n{text}\nafter\n"
    assert (tmp_path / "example.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("seeds", "answer", "sentence"),
    [
        (1, "| one seed | too few seeds |", "-0.5000 on one seed, which shows nothing."),
        (2, "| too few seeds |", "-0.4950 on 2 seeds, too few to call it a difference (-0.5585 to -0.4315)."),
        (3, "| yes |", "better by 0.4900 (-0.5148 to -0.4652)."),
    ],
)
def test_fewer_than_three_seeds_are_no_difference_however_narrow_the_interval(tmp_path, seeds, answer, sentence):
    recipe = make_recipe(sweep=[{"learning_rate": 1.0}])
    results = Results(tmp_path)
    for seed in range(seeds):
        results.add(record(recipe, "a", 0, seed, 2.0 + seed))
        results.add(record(recipe, "b", 0, seed, 1.5 + 1.01 * seed))
    text = report(recipe, results, tmp_path)
    assert answer in text
    assert f"- **B** against A: loss, mean: {sentence}" in text


def test_what_is_made_afresh_wants_a_folder_of_its_own(capsys):
    recipe = ["--recipe", str(RECIPES[0]), "--afresh"]
    for folder in ([], ["--results", str(entry.KEPT)]):
        with pytest.raises(SystemExit):
            entry.main(recipe + folder)
        assert "--afresh" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("afresh", [False, True])
def test_finished_runs_are_taken_over_unless_all_are_made_afresh(tmp_path, monkeypatch, afresh):
    recipe = make_recipe()
    for point in (0, 1):
        Results(tmp_path / "kept" / "other").add(record(recipe, "a", point, 0, 3.0))
    monkeypatch.setattr(entry, "KEPT", tmp_path / "kept")
    arguments = entry.parse(["--recipe", "-", "--results", str(tmp_path / "new")] + ["--afresh"] * afresh)
    assert len(entry.to_adopt(arguments)) == (0 if afresh else 1)


def test_report_takes_the_best_rate_once_it_has_all_seeds_and_keeps_the_other(tmp_path):
    arms = {"a": {"label": "A"}, "b": {"label": "B", "settings": {"weight_decay": 0.0}}}
    recipe = make_recipe(arms=arms, seeds=[0, 1])
    results = Results(tmp_path)
    for arm, shift in (("a", 0.0), ("b", 0.5)):
        for seed in (0, 1):
            results.add(record(recipe, arm, 0, seed, 3.0 + shift))
        results.add(record(recipe, arm, 1, 0, 2.0 + 2 * shift))
    before = report(recipe, results, tmp_path)
    assert "| B | A | loss, mean | 2 | +0.5000 |" in before
    assert "The same at" not in before
    for arm, shift in (("a", 0.0), ("b", 0.5)):
        results.add(record(recipe, arm, 1, 1, 2.0 + 2 * shift))
    best, other = report(recipe, results, tmp_path).split("The same at learning rate 1 for these arms:")
    assert "| B | A | loss, mean | 2 | +1.0000 |" in best
    assert "| B | A | loss, mean | 2 | +0.5000 |" in other


def test_curves_of_differences_are_paired_by_seed(tmp_path):
    recipe = make_recipe(sweep=[{"learning_rate": 1.0}])
    results = Results(tmp_path)
    for arm, seeds in (("a", (0, 1)), ("b", (0, 1, 2))):
        for seed in seeds:
            results.add(record(recipe, arm, 0, seed, 2.0 + seed * (1 if arm == "a" else 3)))
    chosen = {arm: chosen_runs(recipe, results.finished, arm) for arm in recipe.arms}
    curves = arm_curves(recipe, results, chosen, "b", "heldout_mean", difference=True)
    assert curves == [{0: 0.0, 500: 0.0, 1000: 0.0}, {0: 0.0, 500: 2.0, 1000: 2.0}]


def test_an_arm_has_one_colour_in_all_figures_of_a_page():
    recipes = [Recipe.read(path) for path in RECIPES]
    for page in {recipe.page for recipe in recipes}:
        assert len({tuple(recipe.arms) for recipe in recipes if recipe.page == page}) == 1, page


def test_four_panels_are_drawn_two_by_two(tmp_path):
    domains = ["heldout_mean", "heldout_stem", "heldout_math", "heldout_code"]
    sizes = []
    for count in (2, 3, 4):
        recipe = make_recipe(sweep=[{"learning_rate": 1.0}], plot=domains[:count])
        results = Results(tmp_path / str(count))
        for seed in recipe.seeds:
            made = record(recipe, "a", 0, seed, 2.0)
            curve = [(tokens, name, value) for name in domains for tokens, _, value in made["curve"]]
            results.add(made | {"curve": curve})
        report(recipe, results, tmp_path)
        header = (tmp_path / "example.png").read_bytes()[16:24]
        sizes.append((int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")))
    assert sizes == [(920, 340), (1380, 340), (920, 680)]


def test_arms_that_only_have_cut_runs_are_compared_where_all_of_them_came(tmp_path):
    recipe = make_recipe(sweep=[{"learning_rate": 1.0}], seeds=[0, 1])
    results = Results(tmp_path)
    for seed in (0, 1):
        results.add(record(recipe, "a", 0, seed, 2.0))
        cut = record(recipe, "b", 0, seed, 1.0, CUT)
        results.add(cut | {"tokens": 500, "curve": [(0, "heldout_mean", 9.0), (500, "heldout_mean", 2.0 + seed)]})
    text = report(recipe, results, tmp_path)
    assert "those after 0.0M tokens" in text
    assert "4 runs (2 of them cut for lack of time), 0.0M tokens each, on" in text
    assert "| B | A | loss, mean | 2 | -0.5000 | -6.8530 to +5.8530 | too few seeds |" in text
    assert [run.arm for run in recipe.runs(results.finished) if run.key not in results.finished] == ["b", "b"]


def test_what_a_stopped_run_had_come_to_is_kept(tmp_path):
    """The process is any that sleeps; its run's folder holds what a run writes, the last line cut short."""
    recipe = make_recipe()
    run = recipe.run("a", 0, 0)
    pool = Pool.__new__(Pool)
    pool.folder, pool.devices, pool.sharing = tmp_path, ["0", "1", "0", "1"], "alone"
    folder = tmp_path / "runs" / run.key
    folder.mkdir(parents=True)
    (folder / "description.json").write_text(json.dumps({"key": run.key, "arm": "a", "device": "cpu"}))
    rows = [{"tokens": tokens, "eval": {"general": 5.0 - tokens / 100}} for tokens in (0, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"tokens": 110, "lo')
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    worker = Worker(1, process, None, ready=True, run=run, since=time.monotonic())
    kept = []
    assert pool._cut(worker, lambda *finished: kept.append(finished))
    assert not process.is_alive()
    ((finished, found),) = kept
    assert finished is run
    assert (found["status"], found["heldout_mean"], found["workers_per_device"]) == (CUT, 4.0, 2)
    assert found["curve"][-1] == (100, "heldout_mean", 4.0)


CONTROL = """#!/bin/sh
if [ "$1" = -d ]; then echo "started for $CUDA_VISIBLE_DEVICES" >> {log}; exit; fi
read command; echo $command >> {log}; [ $command = get_server_list ] && echo 123
exit 0
"""


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ("import os; print(os.environ['CUDA_VISIBLE_DEVICES'].count(',') + 1)", (["0", "1"], "mps")),
        ("raise SystemExit('CUDA error 805')", (["4", "6"], "time slices")),
    ],
)
def test_processes_share_gpus_where_the_service_takes_a_client(tmp_path, monkeypatch, client, expected):
    """The service's control program is a script that notes what it is asked."""
    control = tmp_path / sharing.CONTROL
    control.write_text(CONTROL.format(log=tmp_path / "log"))
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sharing, "CLIENT", client)
    said = []
    with sharing.shared_gpus(["4", "6"], said.append) as found:
        assert found == expected
        assert ("CUDA_MPS_PIPE_DIRECTORY" in os.environ) == (expected[1] == "mps")
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    log = (tmp_path / "log").read_text().split("\n")
    assert log[0] == "started for 4,6"
    assert log[-2] == "quit"
    assert bool(said) == (expected[1] != "mps")
    assert all("CUDA error 805" in line for line in said)


def test_results_of_another_machine_fill_the_gaps(tmp_path):
    recipe = make_recipe()
    here, there = Results(tmp_path / "here"), Results(tmp_path / "there")
    here.add(record(recipe, "a", 0, 0, 2.0))
    here.add(record(recipe, "a", 0, 1, 2.0, CUT))
    for seed in (0, 1, 2):
        there.add(record(recipe, "a", 0, seed, 1.0))
    assert here.take(there) == 2
    records = Results(tmp_path / "here").records
    losses = [float(records[recipe.run("a", 0, seed).key]["heldout_mean"]) for seed in range(3)]
    assert losses == [2.0, 1.0, 1.0]


def test_results_come_back_as_they_were_kept(tmp_path):
    recipe = make_recipe()
    kept = Results(tmp_path)
    kept.add(record(recipe, "a", 0, 0, 2.5))
    again = Results(tmp_path)
    (key,) = again.records
    assert float(again.records[key]["heldout_mean"]) == 2.5
    assert again.curves == kept.curves
    assert names(recipe.runs(again.records)) == names(recipe.runs(kept.records))


def test_summary_tells_what_was_forgotten_and_counts_text_only():
    steps = [
        {"tokens": 0, "eval": {"general": 5.0, "recall": 9.0}},
        {"loss": 4.0, "tokens": 10, "tokens_per_second": 1, "clipped_heads": 2, "max_logits": [3.0, 7.0],
         "max_logits_exact": True},
        {"tokens": 10, "eval": {"general": 3.0, "recall": 8.0}},
        {"loss": 4.0, "tokens": 20, "tokens_per_second": 1, "clipped_heads": 0, "max_logits": [90.0, 5.0],
         "max_logits_exact": False},
        {"tokens": 20, "eval": {"general": 3.5, "recall": 2.0}},
    ]  # fmt: skip
    found = summarise(steps)
    assert (found["heldout_mean"], found["forgotten_general"], found["forgotten_recall"]) == (3.5, 0.5, 0.0)
    assert (found["clipped_heads"], found["clipped_steps"], found["max_logit"]) == (2, 1, 7.0)


@pytest.fixture(scope="module")
def recall_shards(tmp_path_factory):
    """A tokenizer with enough words of one token, and shards of the recall task made with it."""
    folder = tmp_path_factory.mktemp("recall")
    consonants, vowels = "bdfgklmnprst", "aeiou"
    words = [a + b + c for a in consonants for b in vowels for c in consonants[:2]]
    text = " " + " ".join(words)
    tokenizer = train_tokenizer([text] * 20, 600, folder / "tokenizer")
    build_shards(
        folder, {"recall": recall_documents(tokenizer, 4000)}, tokenizer, heldout_fraction=0.2, progress=False
    )
    return folder, tokenizer


def test_recall_documents_are_pairs_twice_in_other_orders(recall_shards):
    _, tokenizer = recall_shards
    for document in recall_documents(tokenizer, 2000):
        first, second = (part.split() for part in document["text"].split("\n"))
        pairs = list(zip(first[::2], first[1::2], strict=True))
        assert sorted(pairs) == sorted(zip(second[::2], second[1::2], strict=True))
        assert len({key for key, _ in pairs}) == len(pairs)
        assert len(tokenizer(document["text"])["input_ids"]) == 4 * len(pairs) + 1
    texts = [[document["text"] for document in recall_documents(tokenizer, 500, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_whole_text_brings_the_recall_task_along(recall_shards, tmp_path):
    folder, _ = recall_shards
    (tmp_path / "source" / "pretrain").mkdir(parents=True)
    for name in ("general", "stem", "math", "code"):
        lines = "".join(json.dumps({"text": f" bab {name} {number}"}) + "\n" for number in range(200))
        path = tmp_path / "source" / "pretrain" / f"{name}.jsonl.zst"
        path.write_bytes(zstandard.compress(lines.encode()))
    manifest = make_whole_text(tmp_path / "source", folder / "tokenizer", tmp_path / "made", recall_tokens=3000)
    assert list(manifest["domains"]) == ["general", "stem", "math", "code", "recall"]
    counts = manifest["domains"]["math"]
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 200
    pretrain = {"total_tokens": 20_000, "batch_tokens": 1000, "num_hidden_layers": 2}

    def recipe(share: float) -> Recipe:
        domains = {"general": {"start": 1 - share, "end": 1 - share}, "recall": {"start": share, "end": share}}
        return make_recipe(data_dir=str(tmp_path / "made"), pretrain=pretrain | {"domains": domains})

    data = prepare_data([recipe(0.1)], tmp_path / "data", tiny=False)
    assert (data / "shards" / "recall").resolve() == tmp_path / "made" / "shards" / "recall"
    with pytest.raises(ValueError, match="prepare it anew"):
        prepare_data([recipe(0.9)], tmp_path / "data", tiny=False)


@pytest.mark.parametrize("name", ["sft_stages", "whole_text"])
def test_text_that_is_missing_is_named_with_the_commands_that_make_it(tmp_path, name):
    with pytest.raises(ValueError, match=r"sft_stages\.py --prepare DATA`") as error:
        prepare_data([make_recipe(data_dir=str(tmp_path / name))], tmp_path / "data", tiny=False)
    whole = "then `python -m benchmarks.experiments.whole_text --prepare DATA`" in str(error.value)
    assert whole == (name == "whole_text")


@pytest.mark.parametrize(
    ("tokens", "words"), [((6.29e6, 6.29e6), "6.3M tokens each"), ((41.4e6, 50.3e6), "41.4M to 50.3M tokens")]
)
def test_runs_of_different_lengths_have_no_common_one(tokens, words):
    assert lengths([{"tokens": str(count)} for count in tokens]) == words


def test_uniform_maps_lie_on_distractors_as_often_as_there_are_any(recall_shards):
    folder, tokenizer = recall_shards
    model = Motif2ForCausalLM(Motif2Config(**SHAPE | {"vocab_size": len(tokenizer)}, attn_implementation="eager"))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    found = measure_recall(model.eval(), folder)
    corpus = TokenCorpus(folder, "recall", "heldout")
    target, distractors = [], []
    for length in corpus.lengths(torch.arange(corpus.num_documents).numpy()):
        pairs = (int(length) - 2) // 4
        seen = [2 * pairs + 2 + 2 * query for query in range(pairs)]
        target += [1 / count for count in seen]
        distractors += [(2 * pairs - 2) / count for count in seen]
    for name in ("signal", "noise", "best_signal", "best_noise"):
        assert found[f"{name}_target"] == pytest.approx(sum(target) / len(target), rel=1e-4)
        assert found[f"{name}_distractors"] == pytest.approx(sum(distractors) / len(distractors), rel=1e-4)
    assert found["recall_accuracy"] < 0.2


def softmax_model(implementation: str, norm_output: bool = False) -> SoftmaxForCausalLM:
    torch.manual_seed(0)
    settings = SHAPE | {"num_attention_heads": 8, "norm_output": norm_output}
    return SoftmaxForCausalLM(SoftmaxConfig(**settings, attn_implementation=implementation))


@pytest.mark.parametrize("norm_output", [False, True])
def test_the_control_is_plain_attention(norm_output):
    attention = softmax_model("eager", norm_output).model.layers[0].self_attn
    torch.nn.init.normal_(attention.q_proj.weight)
    torch.nn.init.normal_(attention.k_proj.weight)
    hidden = torch.randn(2, 5, 16)
    cos, sin = torch.ones(2, 5, 4), torch.zeros(2, 5, 4)  # no rotation
    mask = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    output, _ = attention(hidden, (cos, sin), mask)
    query = (hidden @ attention.q_proj.weight.T).view(2, 5, 8, 4)
    key, value = ((hidden @ layer.weight.T).view(2, 5, 4, 4) for layer in (attention.k_proj, attention.v_proj))
    expected = torch.empty(2, 5, 8, 4)
    for head in range(8):
        logits = query[:, :, head] @ key[:, :, head // 2].mT / 2 + mask[0, 0]
        expected[:, :, head] = logits.softmax(-1) @ value[:, :, head // 2]
    if norm_output:
        expected = expected * (expected.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(output, expected.flatten(2) @ attention.o_proj.weight.T)


def test_the_control_is_initialised_saved_and_loaded_as_any_model(tmp_path):
    model = softmax_model("sdpa", norm_output=True).eval()
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert 0.015 < weight.std() < 0.025
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert isinstance(again, SoftmaxForCausalLM)
    assert again.config.norm_output
    ids = torch.arange(12)[None]
    torch.testing.assert_close(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = model(ids[:, 6:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 6:], alone)


@pytest.mark.slow
@pytest.mark.parametrize("norm_output", [False, True])
def test_compiled_control_has_the_eager_gradients(norm_output):
    torch.manual_seed(0)
    shape = SHAPE | {"num_attention_heads": 8}
    config = softmax_config(Motif2Config(**shape, attn_implementation="sdpa"), norm_output=norm_output)
    model = SoftmaxForCausalLM(config)
    ids = torch.randint(64, (3, 24))
    positions = torch.arange(12).repeat(3, 2)  # two documents a row
    losses, gradients = [], []
    for _ in range(2):
        model.zero_grad()
        loss = model(ids, position_ids=positions, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        if len(losses) == 1:
            compile_layers(model)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_workers_make_all_runs_once(tmp_path):
    command = [sys.executable, "-m", "benchmarks.experiments", "--recipe", "recipes/experiments/attention.yaml"]
    command += ["--tiny", "--workers_per_gpu", "2", "--results", str(tmp_path), "--work", str(tmp_path / "work")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "attention" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"done"}
    for arm in ("softmax", "differential", "gda"):
        own = [row for row in rows if row["arm"] == arm]
        first = {row["learning_rate"] for row in own if row["seed"] == "0"}
        assert (first, len(own)) == ({"0.004", "0.008"}, 4)  # two seeds at each rate
    assert {row["worker"] for row in rows} == {"0", "1"}
    assert not list((tmp_path / "work" / "runs").iterdir())
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "all runs are finished" in again.stdout
