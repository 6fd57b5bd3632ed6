import faulthandler
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from trainer.cli import parse_recipe
from trainer.config import PretrainConfig
from trainer.data.__main__ import main as data_main
from trainer.data.shards import TokenCorpus
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
    assert re.search(r"days on \d+ x 989 TFLOP/s", printed)
    assert float(re.search(r"memory by rank   ([\d.]+) GiB", printed)[1]) < 70  # of the 80 of an H100
    assert "measured peaks were 2 to 12% lower at 12.7B" in printed
    parameters = int(re.search(r"parameters +([\d,]+) ", printed)[1].replace(",", ""))
    assert f"at the start     {4 * parameters / 2**30:.2f} GiB in every rank's host memory" in printed
    (config,) = parse_recipe(PretrainConfig, description="", argv=["--config", str(path)])
    sources = [source for domain in config.domains.values() for source in domain["sources"]]
    assert len(sources) >= len(config.domains)
    assert all(source["license"] for source in sources)


def test_accelerate_files_are_understood():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((ROOT / "recipes/accelerate").glob("*.yaml")):
        if not path.stem.startswith("skypilot"):
            config = load_config_from_file(str(path))
            ranks = {"cpu": 1, "gpu": 1, "fsdp2_node": 8, "hsdp_nodes": 400}[path.stem]
            assert (config.num_processes, config.use_cpu) == (ranks, path.stem == "cpu")


def test_the_cloud_tasks_share_their_folders_between_nodes():
    """50 machines need one folder of shards, tokenised before, and one of checkpoints."""
    tasks = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes/accelerate").glob("sky*.yaml")}
    volume, tokenise, train = (tasks[f"skypilot_{name}"] for name in ("volume", "tokenise", "hsdp"))
    assert volume["config"]["access_mode"] == "ReadWriteMany"
    assert train["volumes"] == tokenise["volumes"] == {"/shared": volume["name"]}
    assert train["secrets"] == tokenise["secrets"] == {"HF_TOKEN": None}
    launch = "recipes/accelerate/hsdp_nodes.yaml"
    assert launch in train["run"]
    assert train["num_nodes"] == yaml.safe_load((ROOT / launch).read_text())["num_machines"]
    configs = []
    for task, module in ((tokenise, "trainer.data"), (train, "trainer.pretrain")):
        words = shlex.split(task["run"].split(f"-m {module} ")[1].replace("\\\n", " "))
        place = words.index("--config") + 1
        words[place] = str(ROOT / words[place])
        (config,) = parse_recipe(PretrainConfig, description="", argv=words)
        configs.append(config)
    assert configs[0].data_dir == configs[1].data_dir
    assert all(folder.startswith("/shared/") for folder in (configs[1].data_dir, configs[1].output_dir))
    assert configs[0].domains == configs[1].domains


def test_the_published_run_is_in_its_recipe(capsys):
    main(["--config", str(ROOT / "recipes/pretrain/motif2_12b7.yaml"), "--dry_run"])
    printed = capsys.readouterr().out
    assert "12,703,860,896" in printed
    assert "16,384,000 (4000 rows of 4096) to 78,643,200 (4800 rows of 16384)" in printed
    assert "states over 8 of 400 ranks, 16,384 tokens at once, chunked loss" in printed
    hours = re.search(r"days on 400 x .* at an MFU of 47% \(([\d,]+) GPU hours\)", printed)[1]
    assert float(hours.replace(",", "")) == pytest.approx(272_000, rel=0.01)


def test_tensor_parallelism_is_reckoned_without_gathering_and_chunks(capsys):
    path = str(ROOT / "recipes/pretrain/motif2_150m.yaml")
    options = ["--compile_layers", "false", "--loss", "auto", "--micro_batch_tokens", "8192"]
    options += ["--dry_run", "--dry_run_gpus", "2"]
    printed = []
    for ranks in ("1", "2"):
        main(["--config", path, *options, "--tensor_parallel", ranks])
        printed.append(re.search(r"(chunked|full) loss .*gathered ([\d.]+)", capsys.readouterr().out).groups())
    assert [kind for kind, _ in printed] == ["chunked", "full"]
    assert 0 < float(printed[1][1]) < float(printed[0][1])


def test_the_launch_lines_name_files_that_fit(capsys):
    """As many ranks as the accelerate file starts share a step's rows evenly, and --dry_run reckons with them."""
    accelerate_files, data_dirs = set(), set()
    for path in RECIPES:
        launch = re.search(r"# Launch: (.*)", path.read_text())[1]
        assert str(path.relative_to(ROOT)) in launch
        file = re.search(r"--config_file (\S+)", launch)
        ranks = yaml.safe_load((ROOT / file[1]).read_text())["num_processes"] if file else 1
        accelerate_files |= {file[1]} if file else set()
        (config,) = parse_recipe(PretrainConfig, description="", argv=["--config", str(path)])
        assert config.batch_rows_multiple % ranks == 0
        assert config.batch_plan().shape(0)[1] % ranks == 0
        assert config.dry_run_gpus == ranks
        data_dirs.add(config.data_dir)
    assert len(accelerate_files) == 2
    assert len(data_dirs) == len(RECIPES)  # shards of a domain with other sources are refused


def test_the_command_line_trains_and_wins_over_the_recipe(recipe, capsys):
    path, config = recipe
    main(["--config", str(path), "--total_tokens", str(128 * 5)])
    printed = capsys.readouterr().out
    assert "5 steps, 640 tokens" in printed
    assert "held-out loss a:" in printed
    assert (Path(config.output_dir) / "model/config.json").is_file()
    with pytest.raises(SystemExit, match="finished run"):
        main(["--config", str(path)])


def test_a_shard_cut_short_under_the_run_says_where_the_run_died(recipe, tmp_path):
    path, config = recipe
    shards = tmp_path / "shards"
    shutil.copytree(config.data_dir, shards)

    def cut_under_the_run():
        faulthandler.disable()
        os.dup2(os.open(tmp_path / "errors", os.O_CREAT | os.O_WRONLY), 2)
        original = TokenCorpus.tokens

        def tokens(self, *args):
            for file in shards.glob("*/train_*.tokens.npy"):
                os.truncate(file, 0)
            return original(self, *args)

        TokenCorpus.tokens = tokens
        main(["--config", str(path), "--data_dir", str(shards), "--eval_steps", "0"])

    process = multiprocessing.get_context("fork").Process(target=cut_under_the_run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGBUS
    assert re.search(r"Bus error.*data/(packing|loader|shards)\.py", (tmp_path / "errors").read_text(), re.DOTALL)


def test_a_launchers_signal_stops_the_run_with_its_last_checkpoint(recipe, tmp_path):
    path, config = recipe

    def train():
        sys.stderr = (tmp_path / "errors").open("w", buffering=1)
        main(["--config", str(path), "--total_tokens", str(128 * 2000), "--checkpoint_steps", "1"])

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    checkpoint = Path(config.output_dir) / "checkpoints/step_00000002"
    while process.is_alive() and not checkpoint.is_dir():
        time.sleep(0.05)
    process.terminate()  # SIGTERM
    process.join(60)
    assert process.exitcode == 1
    where = r"a signal stopped this process at step \d+; the last complete checkpoint is \S+step_\d+: start"
    assert re.search(where, (tmp_path / "errors").read_text())


def test_a_signal_ends_the_process_at_once_before_training(recipe, tmp_path, monkeypatch):
    """Tokenising takes hours, and nobody asks between its steps."""
    path, _ = recipe

    def tokenise(*_):
        (tmp_path / "tokenising").touch()
        time.sleep(60)

    monkeypatch.setattr("trainer.loop.prepare_shards", tokenise)

    def train():
        sys.stderr = (tmp_path / "errors").open("w", buffering=1)
        main(["--config", str(path)])

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    while process.is_alive() and not (tmp_path / "tokenising").exists():
        time.sleep(0.05)
    process.terminate()
    process.join(30)
    assert process.exitcode == 1
    assert "a signal stopped this process before its first step" in (tmp_path / "errors").read_text()


def test_an_interrupted_command_says_that_it_goes_on(recipe, monkeypatch):
    path, _ = recipe

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.loop.prepare_shards", interrupted)
    monkeypatch.setattr("trainer.data.__main__.load_tokenizer", interrupted)
    for command in (main, data_main):
        with pytest.raises(SystemExit, match="interrupted: start the same command again"):
            command(["--config", str(path)])


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
