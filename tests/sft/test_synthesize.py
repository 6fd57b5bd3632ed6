"""Only verified answers are kept, from a model here or an endpoint, and every row says where it comes from."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from eval_harness.sandbox import Sandbox
from sft.curate import CurateConfig
from sft.data import row_problem
from sft.samplers import Endpoint, EndpointError, Judge, LocalModel
from sft.scoring import score_conversation
from sft.synthesize import JOURNAL_FILE, SynthesizeConfig, main, sample_tasks
from sft.synthesize import synthesize as run_synthesis
from sft.tasks import Task, compose_tasks, tasks_from_rows
from sft.verify import verify_candidates
from trainer.cli import parse_recipe

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


HALF = Task("half", "What is 1 divided by 2?", "math", "1/2", skill="division", license="MIT")


def test_math_is_verified_by_meaning_and_keeps_the_shortest():
    candidates = [
        r"One divided by two is \boxed{0.5}, a number between zero and one.",
        r"So \boxed{\frac{1}{2}}.",
        r"So \boxed{\frac{1}{2}}.",
        r"So \boxed{2}.",
        "So 1/2.",
    ]
    result = verify_candidates(HALF, candidates, "teacher")
    (row,) = result.rows
    assert row["messages"][1]["content"] == r"So \boxed{\frac{1}{2}}."
    assert result.rejected == {"wrong answer": 1, "no boxed answer": 1}
    assert row_problem(row) is None
    assert (row["origin"], row["license"], row["source"]) == ("teacher", "MIT", "synthetic/division")
    assert row["provenance"] == {
        "task": "half",
        "model": "teacher",
        "verified_by": "math-verify",
        "answer": "1/2",
        "distinct_candidates": 4,
        "verified_candidates": 2,
    }


def test_forged_markup_is_rejected():
    result = verify_candidates(HALF, [r"\boxed{1/2}<|endofturn|>"], "teacher")
    assert result.rows == []
    assert result.rejected == {"chat markup inside a text": 1}


@needs_sandbox
def test_programs_are_run_against_their_tests():
    task = Task("triple", "Write triple(x).", "code", tests="assert triple(2) == 6\nassert triple(-1) == -3")
    good = "```python\ndef triple(x):\n    return 3 * x\n```"
    answers = [
        good,
        "```python\ndef triple(x):\n    return 6\n```",
        "```python\ndef triple(x:\n```",
        "def triple(x): return 3 * x",
        "```python\nimport os\nos._exit(0)\n```",
    ]
    result = verify_candidates(task, answers, "teacher", sandbox=Sandbox())
    assert [row["messages"][1]["content"] for row in result.rows] == [good]
    assert result.rejected == {"tests failed": 2, "no program": 2}


def test_composed_tasks_have_their_answer_by_construction():
    tasks = compose_tasks(seed=1, count=200, depth=4)
    assert tasks == compose_tasks(seed=1, count=200, depth=4)
    assert tasks != compose_tasks(seed=2, count=200, depth=4)
    operations = {"add": int.__add__, "multiply": int.__mul__, "subtract": int.__sub__, "take": int.__mod__}
    for task in tasks:
        start, *steps = re.split(r"[.,] [Tt]hen ", task.question.partition(". What")[0])
        value = int(start.removeprefix("Start with "))
        for step in steps:
            number = re.search(r"\d+", step)
            value = operations[step.split()[0]](value, int(number[0])) if number else value * value
        assert str(value) == task.answer, task.question


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task("x", "?", "poetry"), "domain 'poetry'; use math or code"),
        (lambda: Task("x", "?", "math"), "has no answer"),
        (lambda: Task("x", "?", "code", tests=" "), "has no tests"),
        (lambda: compose_tasks(0, 1, depth=0), "depth is 0"),
        (lambda: tasks_from_rows([{"text": "x"}]), "row 0 of row has .*give question and answer"),
        (lambda: tasks_from_rows(["text"]), "row 0 of row is no object"),
    ],
)
def test_what_cannot_be_verified_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_real_rows_become_tasks():
    rows = [
        {"question": "How many?", "answer": "1 + 1 = 2\n#### 2", "license": "MIT"},
        {"text": "Write f.", "test_list": ["assert f() == 1", "assert f() != 2"]},
    ]
    math, code = tasks_from_rows(rows)
    assert (math.answer, math.license, code.tests.count("assert")) == ("2", "MIT", 2)
    assert "assert f() != 2" not in code.question


@pytest.fixture
def endpoint():
    """A local fake of an OpenAI-compatible endpoint: `replies` are sent in turn, `requests` are what came."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, body, self.headers.get("Authorization")))
            status, reply = server.answer(body) if server.answer else server.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies, server.answer = [], [], None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()
    server.server_close()


def choices(*texts) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]}


def test_endpoint_gives_candidates_and_retries(endpoint, monkeypatch):
    monkeypatch.setenv("FAKE_KEY", "secret")
    endpoint.replies += [(503, {}), (429, {}), (200, choices(r"\boxed{1/2}", r"\boxed{2}"))]
    sampler = Endpoint(endpoint.url, "teacher", temperature=0.5, key_variable="FAKE_KEY", pause_seconds=0.0)
    ((task, texts),) = sample_tasks([HALF], sampler, candidates=2)
    assert (task, texts) == (HALF, [r"\boxed{1/2}", r"\boxed{2}"])
    path, body, authorization = endpoint.requests[-1]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["n"], body["temperature"]) == ("teacher", 2, 0.5)
    assert body["messages"][0]["content"].startswith(HALF.question)
    assert len(endpoint.requests) == 3


def test_endpoint_that_gives_one_answer_at_a_time_is_asked_again(endpoint):
    endpoint.replies += [(200, choices("a")), (200, choices("b", "c"))]
    sampler = Endpoint(endpoint.url, "teacher", pause_seconds=0.0)
    assert sampler.sample([{"role": "user", "content": "x"}], 3) == ["a", "b", "c"]
    assert [body["n"] for _, body, _ in endpoint.requests] == [3, 2]


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(401, {"error": "who?"})], r"status 401: .*who.*check the address, the model name and the key"),
        ([(500, {})] * 2, "status 500"),
        ([(200, {"text": "x"})], "answered without choices"),
        ([(200, {"choices": []})], "answered with no choice"),
        ([(200, b"<html>")], "no JSON"),
    ],
)
def test_endpoint_that_fails_is_named(endpoint, replies, message):
    endpoint.replies += replies
    with pytest.raises(EndpointError, match=message):
        Endpoint(endpoint.url, "teacher", attempts=2, pause_seconds=0.0).sample([{"role": "user", "content": "x"}], 1)
    assert not endpoint.replies


def test_judge_rates_through_the_endpoint(endpoint):
    judge = Judge(Endpoint(endpoint.url, "judge", attempts=1))
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    endpoint.replies.append((200, choices("7")))
    assert score_conversation(row, judge).judge == 0.7
    assert "Because." in endpoint.requests[0][1]["messages"][0]["content"]
    endpoint.replies.append((200, choices("great")))
    with pytest.raises(ValueError, match="judge judge replied 'great'"):
        judge("Why?", "Because.")


def test_model_here_gives_candidates_without_markup(workplace, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    sampler = LocalModel(model, tokenizer, temperature=1.0, max_tokens=12)
    texts = sampler.sample([{"role": "user", "content": "What is 1 + 1?"}], 3)
    assert len(texts) == 3
    assert len(set(texts)) > 1
    assert not any("<|endofturn|>" in text or "<|endoftext|>" in text for text in texts)
    greedy = LocalModel(model, tokenizer, temperature=0.0, max_tokens=4)
    assert len(set(greedy.sample([{"role": "user", "content": "What is 1 + 1?"}], 3))) == 1


@pytest.fixture
def solver(endpoint):
    """The endpoint solves composed tasks that start below 20, writes the program `triple`, and fails when told to."""

    def answer(body):
        if endpoint.failing and len(endpoint.requests) > endpoint.failing:
            return 401, {"error": "out of credit"}
        question = body["messages"][0]["content"]
        if "triple" in question:
            return 200, choices("```python\ndef triple(x):\n    return 3 * x\n```", "no idea")
        found = known.get(question.partition("\n")[0], "0")
        wrong = int(re.search(r"Start with (\d+)", question)[1]) >= 20
        return 200, choices(rf"\boxed{{{found}1}}" if wrong else rf"It is \boxed{{{found}}}.", "no idea")

    known = {task.question: task.answer for task in compose_tasks(0, 8, 2)}
    endpoint.answer, endpoint.failing = answer, 0
    return endpoint


@pytest.fixture
def config(solver, tmp_path):
    def make(**changes) -> SynthesizeConfig:
        settings = {"output_dir": str(tmp_path / "synthetic"), "composed_tasks": 8, "composed_depth": 2}
        settings |= {"endpoint_url": solver.url, "endpoint_model": "teacher", "candidates": 2, "workers": 3}
        return SynthesizeConfig(**(settings | {"progress": False} | changes))

    return make


def words_of(config: SynthesizeConfig) -> list[str]:
    words = []
    for name, value in vars(config).items():
        if value not in ("", []):
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def test_synthesis_writes_verified_rows_and_a_report(config, capsys, tmp_path):
    run = config()
    main(words_of(run))
    tasks = compose_tasks(0, 8, 2)
    solved = [task for task in tasks if int(re.search(r"\d+", task.question)[0]) < 20]
    rows = [json.loads(line) for line in (tmp_path / "synthetic" / "train.jsonl").read_text().splitlines()]
    assert 0 < len(solved) < 8
    assert [row["provenance"]["task"] for row in rows] == [task.identifier for task in solved]
    assert all(row_problem(row) is None and row["origin"] == "teacher" for row in rows)
    report = json.loads((tmp_path / "synthetic" / "report.json").read_text())
    assert report["rejected"] == {"no boxed answer": 8, "wrong answer": 8 - len(solved)}
    assert report["unsolved"] == [task.identifier for task in tasks if task not in solved]
    assert f"{len(solved)} verified answers, {8 - len(solved)} of 8 tasks unsolved" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a finished synthesis"):
        main(words_of(run))


def test_synthesis_goes_on_where_the_endpoint_failed(config, solver, tmp_path):
    solver.failing = 5
    with pytest.raises(SystemExit, match=r"out of credit.* the same command goes on"):
        main(words_of(config(workers=1)))
    journal = tmp_path / "synthetic" / JOURNAL_FILE
    done = len(journal.read_text().splitlines())
    assert 0 < done <= 5
    with journal.open("a") as file:
        file.write('{"task": "cut sho')
    with pytest.raises(ValueError, match=r"other settings \(candidates 2 -> 3\)"):
        run_synthesis(config(candidates=3))
    solver.failing = 0
    solver.requests.clear()
    resumed = run_synthesis(config(workers=2)).read_text()
    assert len(solver.requests) == 8 - done
    assert resumed == run_synthesis(config(output_dir=str(tmp_path / "whole"))).read_text()


@needs_sandbox
def test_files_of_tasks_are_solved_and_evaluation_text_is_left_out(config, write_rows, tmp_path):
    leaked = "A very long question that stands in the evaluation set word by word, with 13 words and more: how many?"
    tasks = write_rows(
        [
            {"text": "Write triple(x).", "test_list": ["assert triple(2) == 6"], "license": "MIT"},
            {"question": leaked, "answer": "#### 3"},
        ],
        "known.jsonl",
    )
    evaluation = write_rows([{"question": leaked}], "evaluation.jsonl")
    run = config(task_files=[tasks], eval_files=[evaluation], composed_tasks=0)
    (row,) = [json.loads(line) for line in run_synthesis(run).read_text().splitlines()]
    assert row["provenance"]["verified_by"] == "tests in the sandbox"
    assert (row["provenance"]["task"], row["license"]) == ("known/0", "MIT")
    assert json.loads((tmp_path / "synthetic" / "report.json").read_text())["left_out_as_evaluation_text"] == 1
    with pytest.raises(ValueError, match="have the same name"):
        run_synthesis(config(task_files=[tasks, tasks], output_dir=str(tmp_path / "twice")))


def test_synthesis_where_nothing_verifies_says_so(config, solver, tmp_path):
    solver.answer = lambda body: (200, choices("no idea", "none"))
    with pytest.raises(ValueError, match=r"no answer to 8 tasks verified .*'no boxed answer': 16"):
        run_synthesis(config())


def test_dry_run_of_a_synthesis_asks_nothing(config, solver, capsys, tmp_path):
    main(words_of(config(dry_run=True)))
    shown = capsys.readouterr().out
    for text in ("candidates: 2", "8 tasks, 0 left out", "8 math, compose-2", "16 answers", "End with the answer in"):
        assert text in shown
    main(words_of(config(dry_run=True, task_files=["absent.parquet"])))
    assert "not on this machine, tasks not read: absent.parquet" in capsys.readouterr().out
    assert not solver.requests
    assert not (tmp_path / "synthetic").exists()


def test_model_here_can_be_the_source(config, workplace, tmp_path):
    run = config(endpoint_url="", endpoint_model="", model_name_or_path=str(workplace / "base"), max_tokens=4)
    with pytest.raises(ValueError, match="no answer to 8 tasks verified"):
        run_synthesis(run)
    assert len((tmp_path / "synthetic" / JOURNAL_FILE).read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"composed_tasks": 0}, "nothing to solve"),
        ({"endpoint_url": "", "endpoint_model": ""}, "set exactly one of them"),
        ({"model_name_or_path": "x"}, "set exactly one of them"),
        ({"endpoint_model": ""}, "set both or neither"),
        ({"candidates": 0}, "candidates is 0; use 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; use 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_recipe_of_the_synthesis_feeds_stage_2(capsys):
    folder = Path(__file__).parents[2] / "recipes" / "sft"
    run = parse_recipe(SynthesizeConfig, description="", argv=["--config", str(folder / "synthesize.yaml")])[0]
    selection = parse_recipe(CurateConfig, description="", argv=["--config", str(folder / "prepare_stage2.yaml")])[0]
    assert f"{run.output_dir}/train.jsonl" in selection.train_files
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--composed_tasks" in capsys.readouterr().out
