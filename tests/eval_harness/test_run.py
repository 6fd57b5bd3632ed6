"""The command from end to end on a tiny model: run, interrupt, report, compare; and every mistake explained."""

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from eval_harness.run import main
from eval_harness.sandbox import INSTALL
from tests.eval_harness.benchmark_sets import write_benchmarks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(checkpoint, data_dir, *more):
    """A command's words; prompts are cut, since the tiny tokenizer makes thousands of tokens of them."""
    short = ["--model_args", "max_length=512,truncation=True"]
    return ["--model", str(checkpoint), "--data_dir", str(data_dir), "--dtype", "float64", *short, *more]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)
def test_a_run_its_report_and_a_comparison(checkpoint, data_dir, tmp_path, capsys):
    chosen = ("--suite", "base", "--tasks", "gsm8k_4shot,math,humaneval", "--max_gen_toks", "8", "--skip_missing")
    for name, seed in (("first", "1"), ("second", "2")):
        main(words(checkpoint, data_dir, *chosen, "--seed", seed, "--output", str(tmp_path / name)))
    printed = capsys.readouterr().out
    assert "| GSM8K | 4 | exact_match | 2 | 0.00 |" in printed
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert [line["label"] for line in report["lines"]] == ["GSM8K", "MATH", "HumanEval"]
    assert report["lines"][0]["published"]["Motif-2-12.7B"] == 93.85
    assert "without counting_and_probability" in report["lines"][1]["note"]
    page = (tmp_path / "first" / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    assert 'href="samples/motif2_humaneval.html"' in page
    assert "add0" in (tmp_path / "first" / "samples" / "motif2_humaneval.html").read_text()
    main(["compare", str(tmp_path / "first"), str(tmp_path / "second")])
    assert "| motif2_gsm8k_4shot | exact_match | 2 | +0.00 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a finished run"):
        main(words(checkpoint, data_dir, *chosen, "--output", str(tmp_path / "first")))


def test_dry_run_lists_rows_and_what_cannot_be_run(checkpoint, data_dir, capsys):
    main(words(checkpoint, data_dir, "--suite", "base", "--tasks", "gsm8k", "--dry_run"))
    printed = capsys.readouterr().out
    assert "motif2_gsm8k_4shot: 2 rows" in printed
    assert "not run: SuperGPQA" in printed
    assert "batch_size: 16" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "bse"], "did you mean 'base'"),
        (["--suite", "base", "--tasks", "gsm8q"], "did you mean 'gsm8k'"),
        (["--tasks", "motif2_gsm8k_9shot"], "did you mean 'motif2_gsm8k_"),
        (["--suite", "base", "--tasks", "math"], "hf download EleutherAI/hendrycks_math"),
        (["--suite", "instruct", "--tasks", "gsm8k"], "no chat template"),
        (["--tasks", "motif2_math_4shot::algebrra"], "did you mean 'algebra'"),
        ([], "neither suite nor tasks"),
        (["--suite", "base", "--batch_size", "0"], "batch_size is 0"),
        (["--suite", "base", "--backend", "tpu"], "backend is 'tpu'"),
        (["--suite", "base", "--sute", "x"], "did you mean 'suite'"),
        (["--suite", "base", "--repeats", "4"], "add --temperature"),
        (["--suite", "instruct", "--repeats", "4", "--temperature", "0"], "add --temperature"),
        (["--suite", "base", "--temperature", "-1"], "temperature is -1"),
        (["--suite", "base", "--model_args", "max_length"], "model_args holds 'max_length'"),
        (["--tasks", "motif2_gsm8k_4shot", "--model_args", "max_length=64"], "the model's window has 64"),
        (["--tasks", "motif2_gsm8k_4shot", "--model", "/nope"], "model '/nope' is no folder"),
        (["--tasks", "motif2_gsm8k_4shot", "--model", "no/such"], "model 'no/such' could not be loaded"),
        (["--tasks", "motif2_gsm8k_4shot", "--model_args", "colour=3"], "colour"),
        pytest.param(
            ["--suite", "base", "--tasks", "arc_easy"], "arc_easy could not be read", marks=pytest.mark.slow
        ),  # datasets asks again and again before it gives up
    ],
)
def test_mistakes_are_explained(checkpoint, data_dir, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        main(words(checkpoint, data_dir, "--output", str(tmp_path / "run"), *more))
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_a_run_that_stopped_at_the_window_goes_on_with_a_wider_one(checkpoint, data_dir, tmp_path, capsys):
    chosen = ["--tasks", "motif2_math_chat::algebra,motif2_mmlu_5shot::anatomy", "--output", str(tmp_path / "run")]
    narrow = words(checkpoint, data_dir, *chosen, "--model_args", "max_length=160", "--max_gen_toks", "4")
    with pytest.raises(SystemExit, match="the model's window has 160"):
        main(narrow)
    wide = words(checkpoint, data_dir, *chosen, "--model_args", "max_length=800", "--max_gen_toks", "4")
    main(wide)
    printed = capsys.readouterr().out
    assert "(2 found on file)" in printed, printed


def test_responses_under_another_tokenizer_are_refused(checkpoint, tokenizer, data_dir, tmp_path):
    chosen = ["--tasks", "motif2_gsm8k_chat", "--max_gen_toks", "2", "--output", str(tmp_path / "run")]
    main(words(checkpoint, data_dir, *chosen))
    (tmp_path / "run" / "results.json").unlink()
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="use another output folder"):
        main(words(checkpoint, data_dir, *chosen, "--tokenizer", str(tmp_path / "other")))


def test_a_folder_without_rows_and_a_model_without_name_are_explained(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(checkpoint), "--suite", "base", "--data_dir", str(tmp_path / "no"), "--output", "x"])
    assert "is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--suite", "base", "--output", "x"])
    assert "model is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "a", "b"], "a holds no finished run"),
        (["compare", "a"], "the second run is not given"),
        (["compare", "a", "b", "c"], "3 folders are given"),
        (["compare", "a", "b", "--part"], "did you mean 'parts'"),
        (["comprae", "a", "b"], "did you mean 'compare'"),
        (["contamination", "--corpus", "no.jsonl"], "no.jsonl does not exist"),
    ],
)
def test_mistakes_in_commands_are_explained(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert message in f"{stopped.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("command", [[], ["compare"], ["contamination"]])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert " ".join(["motif2-eval", *command]) in printed


@pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)
def test_several_programs_a_problem_give_pass_at_10(checkpoint, data_dir, tmp_path, capsys):
    chosen = ["--suite", "base", "--tasks", "humaneval", "--max_gen_toks", "4", "--repeats", "10"]
    main(words(checkpoint, data_dir, *chosen, "--temperature", "0.8", "--output", str(tmp_path / "run")))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["motif2_humaneval"] == {"pass@1": 0.0, "pass@10": 0.0}
    assert results["cost"]["responses"] == 20
    lines = json.loads((tmp_path / "run" / "report.json").read_text())["lines"]
    assert [(line["metric"], bool(line["published"])) for line in lines] == [("pass@1", True), ("pass@10", False)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples" / "motif2_humaneval.jsonl").open()]
    assert all(len(set(row["resps"][0])) > 1 for row in rows)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)
def test_groups_are_compared_over_all_their_rows(checkpoint, data_dir, tmp_path, capsys):
    chosen = ("--tasks", "motif2_math_4shot,motif2_gsm8k_4shot", "--max_gen_toks", "4", "--skip_missing")
    for name in ("first", "second"):
        main(words(checkpoint, data_dir, *chosen, "--output", str(tmp_path / name)))
    path = tmp_path / "second" / "samples" / "motif2_math_4shot.algebra.jsonl"
    rows = [json.loads(line) | {"math_verify": 1.0, "prompt_hash": "other"} for line in path.open()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    runs = [str(tmp_path / "first"), str(tmp_path / "second")]
    main(["compare", *runs, "--output", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "| motif2_math_4shot | math_verify | 2 | +100.00 |" in printed
    assert "algebra" not in printed
    assert "protocol differs too: motif2_math_4shot (2 rows)." in printed
    assert json.loads((tmp_path / "found.json").read_text())[-1]["other_prompts"] == 2
    main(["compare", *runs, "--parts"])
    assert "| motif2_math_4shot.algebra | math_verify | 2 | +100.00 |" in capsys.readouterr().out


class CompletionsServer(BaseHTTPRequestHandler):
    """An API that completes everything with the same sentence."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
        choices = [{"index": index, "text": " It is 14. The answer is 14."} for index in range(len(prompts))]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        """Keep the test's output clean."""


def test_an_api_is_asked_like_a_model(checkpoint, data_dir, tmp_path, capsys):
    pytest.importorskip("tenacity", reason="pip install lm-eval[api]")
    with HTTPServer(("127.0.0.1", 0), CompletionsServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"base_url=http://127.0.0.1:{server.server_address[1]}/v1/completions"
        options = f"{address},tokenizer={checkpoint},tokenizer_backend=huggingface,tokenized_requests=False"
        chosen = ["--backend", "local-completions", "--model_args", options, "--tasks", "motif2_gsm8k_4shot"]
        main(
            [
                "--model",
                "m",
                "--data_dir",
                str(data_dir),
                "--output",
                str(tmp_path / "run"),
                "--batch_size",
                "1",
                *chosen,
            ]
        )
        server.shutdown()
    assert "| motif2_gsm8k_4shot | 4 | exact_match | 2 | 50.00 |" in capsys.readouterr().out


def test_a_backend_that_is_not_installed_is_explained(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = ["--model", "m", "--backend", "vllm", "--tasks", "motif2_gsm8k_4shot", "--data_dir", str(data_dir)]
    with pytest.raises(SystemExit, match=r"pip install lm-eval\[vllm\]"):
        main([*words, "--output", str(tmp_path / "run")])


@pytest.mark.slow
def test_two_processes_score_like_one(checkpoint, data_dir, tmp_path):
    chosen = ("--tasks", "motif2_gsm8k_4shot,motif2_mmlu_5shot::anatomy", "--max_gen_toks", "4")
    main(words(checkpoint, data_dir, *chosen, "--output", str(tmp_path / "one")))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "eval_harness.run",
    ]
    subprocess.run([*launch, *words(checkpoint, data_dir, *chosen, "--output", str(tmp_path / "two"))], check=True)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    assert one["num_samples"] == two["num_samples"]


@pytest.mark.slow
def test_tasks_work_from_plain_lm_eval(checkpoint, data_dir, tmp_path):
    command = [sys.executable, "-m", "lm_eval", "run", "--include_path", "eval_harness/tasks", "--model", "hf"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float64,trust_remote_code=True", "--device", "cpu"]
    command += [
        "--tasks",
        "motif2_gsm8k_4shot,motif2_humaneval",
        "--metadata",
        json.dumps({"data_dir": str(data_dir)}),
    ]
    command += ["--gen_kwargs", "max_gen_toks=8", "--output_path", str(tmp_path)]
    subprocess.run(command, check=True)
    (results,) = tmp_path.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["motif2_gsm8k_4shot"]["exact_match,answer"] == 0
    assert scores["motif2_humaneval"]["pass@1,answer"] == 0
