import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.trainer.test_loop import curve
from trainer.cli import parse_recipe
from trainer.config import PretrainConfig
from trainer.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes/pretrain").glob("*.yaml"))


@pytest.fixture
def recipe(make_config, tmp_path):
    """A miniature recipe as a file, and its settings."""
    config = make_config()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    return path, config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_would_do(path, capsys):
    header = path.read_text().split("output_dir:")[0]
    assert all(word in header for word in ("Hardware:", "Launch:", "arXiv", "ssumption"))
    main(["--config", str(path), "--dry_run"])
    printed = capsys.readouterr().out
    assert "days on 8 x 989 TFLOP/s" in printed
    (config,) = parse_recipe(PretrainConfig, description="", argv=["--config", str(path)])
    assert all(domain["sources"] for domain in config.domains.values())


def test_accelerate_files_are_understood():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((ROOT / "recipes/accelerate").glob("*.yaml")):
        if path.stem.startswith("skypilot"):
            assert "recipes/accelerate/hsdp_nodes.yaml" in yaml.safe_load(path.read_text())["run"]
        else:
            assert load_config_from_file(str(path)).num_processes >= 1


def test_the_published_model_is_in_its_recipe(capsys):
    main(["--config", str(ROOT / "recipes/pretrain/motif2_12b7.yaml"), "--dry_run", "--dry_run_gpus", "400"])
    printed = capsys.readouterr().out
    assert "12,703,860,896" in printed
    assert "16,384,000 (4000 rows of 4096) to 81,920,000 (5000 rows of 16384)" in printed
    assert "days on 400 x" in printed


def test_the_command_line_trains_and_wins_over_the_recipe(recipe, capsys):
    path, config = recipe
    main(["--config", str(path), "--total_tokens", str(128 * 5)])
    printed = capsys.readouterr().out
    assert "5 steps, 640 tokens" in printed
    assert "held-out loss a:" in printed
    assert (Path(config.output_dir) / "model/config.json").is_file()
    with pytest.raises(SystemExit, match="finished run"):
        main(["--config", str(path)])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "goes on from the last" in printed
    assert "shares of the mixture" in printed


def test_unknown_keys_name_the_nearest(recipe, capsys):
    path, _ = recipe
    path.write_text(path.read_text() + "learning_rat: 1.0\n")
    with pytest.raises(SystemExit):
        main(["--config", str(path)])
    assert "'learning_rate'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_twenty_random_kills_do_not_change_the_curve(recipe, make_config, tmp_path, num_ranks):
    """SIGKILL at random moments, checkpoint writing included; the curve must be the undisturbed run's, bit for bit."""
    settings = {"total_tokens": 128 * 60, "checkpoint_steps": 2, "eval_steps": 0}
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for name, folder in folders.items():
        config = make_config(output_dir=str(folder), **settings)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert _start(tmp_path / "whole.yaml", num_ranks).wait() == 0
    moments = random.Random(0)
    kills = 0
    while not (folders["killed"] / "model").exists():
        process = _start(tmp_path / "killed.yaml", num_ranks)
        if kills < 20:
            _wait_for_steps(folders["killed"] / "metrics.jsonl", process)
            time.sleep(moments.uniform(0, 0.5))
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert kills == 20 or process.returncode == -signal.SIGKILL
    assert kills == 20
    assert curve(folders["killed"]) == curve(folders["whole"])


def _start(recipe: Path, num_ranks: int) -> subprocess.Popen:
    launcher = (
        [] if num_ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks), "-m"]
    )
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "trainer.pretrain", "--config", str(recipe)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _wait_for_steps(metrics: Path, process: subprocess.Popen) -> None:
    """Return once the restarted run has made a step."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None:
        time.sleep(0.05)
        if metrics.exists() and metrics.stat().st_size and metrics.stat().st_mtime_ns > before:
            return
