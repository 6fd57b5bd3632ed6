"""Pictures come from the metrics file; a file without steps, or cut short, is named."""

import json

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

import trainer.plots
from trainer.plots import plot_run, plot_scores, plot_stage_losses, read_metrics


def write_metrics(path):
    rows = [
        {
            "step": step,
            "tokens": 100 * step,
            "loss": 5 / step,
            "learning_rate": 0.01,
            "mixture": {"a": 0.7, "b": 0.3},
            "realised": {"a": 0.75, "b": 0.25},
            "lambdas": [0.1, 0.2],
            "max_logits": [1.0, step],
        }
        for step in range(1, 30)
    ]
    rows.insert(3, {"step": 3, "tokens": 300, "eval": {"a": 2.0, "b": 3.0}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pictures_are_drawn_and_hold_something(tmp_path):
    files = plot_run(write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "pictures")
    files.append(plot_stage_losses({"one": [(1, 2.0), (2, 1.0)], "two": [(1, 1.0)]}, tmp_path / "stages.png"))
    files.append(plot_scores(["before", "after"], [0.0, 0.5], [0.0, 0.1], "right", tmp_path / "scores.png"))
    names = ["loss", "mixture", "learning_rate", "lambda", "max_logits", "stages", "scores"]
    assert [file.stem for file in files] == names
    for file in files:
        assert matplotlib.image.imread(file).std() > 0.01, f"{file} is blank"


def test_more_domains_than_colours_are_all_drawn(tmp_path, monkeypatch):
    domains = {f"domain{number}": 1 / 9 for number in range(9)}
    rows = [
        {"step": 1, "tokens": 9, "loss": 1.0, "learning_rate": 0.1, "mixture": domains, "realised": domains},
        {"step": 1, "tokens": 9, "eval": domains},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = {}

    def note(figure, path):
        labels[path.stem] = figure.axes[0].get_legend_handles_labels()[1]
        plt.close(figure)

    monkeypatch.setattr(trainer.plots, "_save", note)
    plot_run(tmp_path / "metrics.jsonl", tmp_path)
    assert labels["loss"] == ["training", *(f"held-out {name}" for name in domains)]
    assert labels["mixture"][:9] == [f"{name}, scheduled" for name in domains]


def test_file_without_steps_and_file_cut_short_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no training step"):
        plot_run(path, tmp_path)
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
