"""Only verified answers are kept, from a model here or an endpoint, and every row says where it comes from."""

import errno
import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from eval_harness.sandbox import Sandbox
from sft.chat import set_stop_tokens, stop_token_ids
from sft.curate import CurateConfig
from sft.data import NOT_UNICODE, DataReport, read_rows, row_problem
from sft.journal import JOURNAL_FILE
from sft.samplers import Endpoint, EndpointError, Judge, LocalModel, RequestRefused, in_order
from sft.synthesize import SynthesizeConfig, load_sampler, load_tasks, main, sample_tasks
from sft.synthesize import synthesize as run_synthesis
from sft.tasks import Task, compose_tasks, tasks_from_rows
from sft.verify import verify_all, verify_candidates
from trainer.cli import parse_recipe


def choices(*texts) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]}


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
    result = verify_candidates(HALF, [r"\boxed{1/2}<|endofturn|>", r"It is simply \boxed{1/2}, as always."], "teacher")
    assert [row["messages"][1]["content"] for row in result.rows] == [r"It is simply \boxed{1/2}, as always."]
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
        (lambda: tasks_from_rows([("f:1", {})], DataReport(), bad_rows="refuse"), "row f:1 is no task: no question"),
    ],
)
def test_what_cannot_be_verified_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_real_rows_become_tasks():
    rows = [
        {"question": "How many?", "answer": "1 + 1 = 2\n#### 2", "license": "MIT"},
        {"text": "Write f.", "test_list": ["assert f() == 1", "assert f() != 2"], "test_setup_code": ""},
        {"prompt": "Write g.", "test_list": ["assert g(math.pi)"], "test_imports": ["import math"]},
        {"text": "Write h.", "test_list": "assert h(Node(1)) == 1", "test_setup_code": "class Node:\n    pass"},
        {"question": "How many?", "answer": 2.5},
    ]
    report = DataReport()
    math, code, sanitized, setup, number = tasks_from_rows([("f:1", row) for row in rows], report, "known")
    assert (math.answer, math.license, code.tests.count("assert")) == ("2", "MIT", 2)
    assert "assert f() != 2" not in code.question
    assert sanitized.question == "Write g.\nYour program must pass:\nimport math\nassert g(math.pi)"
    assert sanitized.tests == "import math\nassert g(math.pi)"
    assert setup.tests == "class Node:\n    pass\nassert h(Node(1)) == 1"
    assert (number.answer, number.identifier, report.rows, not report.dropped) == ("2.5", "known/4", 5, True)


NO_TASKS = {
    "not a JSON object": "text",
    "license is not text": {"question": "?", "answer": "1", "license": ["MIT"]},
    "neither an answer (math) nor a test_list (code)": {"question": "How many?"},
    "an empty answer": {"question": "How many?", "answer": "#### "},
    "no question: no text in question (math), or in text or prompt (code)": {"question": 5, "answer": "#### 1"},
    "no tests in test_list": {"text": "x", "test_list": []},
    "tests that are no Python": {"text": "x", "test_list": ["assert ("]},
    NOT_UNICODE: {"question": "\ud800?", "answer": "1"},
}
NO_TASKS_TOO = (
    ({"text": "x", "test_list": [5, None, " "]}, "no tests in test_list"),
    ({"prompt": "x", "test_list": None}, "no tests in test_list"),
    ({"text": "x", "test_list": ["(" * 5000]}, "tests that are no Python"),
    ({"test_list": ["assert 1"]}, "no question: no text in question (math), or in text or prompt (code)"),
    ({"question": "?", "answer": [1]}, "neither an answer (math) nor a test_list (code)"),
)


def test_a_row_that_is_no_task_is_counted_and_costs_no_other(write_rows):
    path = write_rows([*NO_TASKS.values(), {"question": "How many?", "answer": "1"}], "rows.jsonl")
    report = DataReport()
    (task,) = tasks_from_rows(read_rows(path), report)
    assert (task.identifier, report.rows, dict(report.dropped)) == ("row/8", 9, dict.fromkeys(NO_TASKS, 1))
    assert report.places["no tests in test_list"] == [f"{path}:6"]


@pytest.mark.parametrize(("row", "reason"), NO_TASKS_TOO)
def test_more_rows_that_are_no_task(row, reason):
    report = DataReport()
    assert tasks_from_rows([("f:1", row)], report) == []
    assert dict(report.dropped) == {reason: 1}


def test_a_program_of_brackets_without_end_is_no_program():
    task = Task("deep", "?", "code", tests="assert f()")
    assert verify_all(task, ["```python\n" + "(" * 100_000 + "\n```"], FakeSandbox()) == ["no program"]


class FakeSandbox:
    def run_many(self, programs):
        assert not programs
        return []


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


BROKEN = {
    "a reply that breaks off": b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"ch',
    "a reply that is no HTTP": b"xxx\r\n\r\n",
    "no reply": b"",
    "an error that breaks off": b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n{",
}


@pytest.mark.parametrize("name", BROKEN)
def test_replies_that_break_off_are_asked_for_again(endpoint, name):
    endpoint.replies += [(0, BROKEN[name]), (200, choices("a"))]
    sampler = Endpoint(endpoint.url, "teacher", attempts=2, pause_seconds=0.0)
    assert sampler.sample([{"role": "user", "content": "x"}], 1) == ["a"]
    endpoint.replies += [(0, BROKEN[name])] * 2
    with pytest.raises(EndpointError, match="gave no answer"):
        sampler.sample([{"role": "user", "content": "x"}], 1)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a "}, {"type": "image_url"}, {"text": "b"}], "a b"),
        (None, ""),
        ([], ""),
    ],
)
def test_content_may_come_in_parts(endpoint, content, text):
    endpoint.replies.append((200, choices(content)))
    assert Endpoint(endpoint.url, "teacher").sample([{"role": "user", "content": "x"}], 1) == [text]


@pytest.mark.parametrize("reply", [[1], {"choices": 5}, {"choices": ["x"]}, choices(7), choices([7]), choices([{}])])
def test_replies_of_another_form_are_named(endpoint, reply):
    endpoint.replies.append((200, reply))
    with pytest.raises(EndpointError, match="answered without choices"):
        Endpoint(endpoint.url, "teacher").sample([{"role": "user", "content": "x"}], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"url": "teacher"}, "'teacher' has no http://"), ({"timeout_seconds": 0}, "timeout_seconds is 0")],
)
def test_an_endpoint_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**({"url": "http://x/v1", "model": "m"} | settings))


def test_one_request_that_is_refused_is_told_from_an_endpoint_that_fails(endpoint):
    endpoint.replies.append((400, {"error": "too long"}))
    with pytest.raises(RequestRefused, match=r"refused a request \(status 400: .*too long") as refused:
        Endpoint(endpoint.url, "teacher").sample([{"role": "user", "content": "x"}], 1)
    assert refused.value.status == 400


def test_work_is_done_several_at_a_time_and_in_order():
    together = threading.Barrier(3, timeout=20)

    def work(number):
        together.wait()
        return number * number

    assert list(in_order(work, range(6), workers=3)) == [(number, number * number) for number in range(6)]


def test_what_was_in_work_beside_a_failure_is_not_lost():
    together, found = threading.Barrier(3, timeout=20), []

    def work(number):
        together.wait()
        return 6 // number

    with pytest.raises(ZeroDivisionError):
        found.extend(in_order(work, [2, 0, 3], workers=3))
    assert found == [(2, 3), (3, 2)]


def test_judge_rates_through_the_endpoint(endpoint):
    judge = Judge(Endpoint(endpoint.url, "judge", attempts=1))
    endpoint.replies.append((200, choices("7")))
    assert judge("Why?", "Because.") == 0.7
    assert "Because." in endpoint.requests[0][1]["messages"][0]["content"]
    for reply in ("7/10", "I say 7 out of 10.", "<think>10?</think> 7.0", "It is 3, no: 7"):
        endpoint.replies.append((200, choices(reply)))
        assert judge("Why?", "Because.") == 0.7
    for reply in ("great", "11"):
        endpoint.replies.append((200, choices(reply)))
        with pytest.raises(ValueError, match=f"judge judge replied '{reply}', which is no number from 0 to 10"):
            judge("Why?", "Because.")


def test_model_here_gives_candidates_without_markup(workplace, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    set_stop_tokens(model, tokenizer)
    sampler = LocalModel(model, tokenizer, temperature=1.0, max_tokens=12)
    texts = sampler.sample([{"role": "user", "content": "What is 1 + 1?"}], 3)
    assert len(texts) == 3
    assert len(set(texts)) > 1
    assert not any("<|endofturn|>" in text or "<|endoftext|>" in text for text in texts)
    greedy = LocalModel(model, tokenizer, temperature=0.0, max_tokens=4)
    assert len(set(greedy.sample([{"role": "user", "content": "What is 1 + 1?"}], 3))) == 1


LLAMA_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{{ 'assistant:' }}"


def save_llama(folder, template: str | None) -> Path:
    """A tiny Llama whose letters are its tokens and whose replies end with `</s>` or `;`."""
    torch.manual_seed(0)
    letters = {letter: number for number, letter in enumerate(["<unk>", "</s>", *map(chr, range(32, 127))])}
    bare = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.generation_config.eos_token_id = [1, letters[";"]]
    model.save_pretrained(folder)
    return folder


def test_any_causal_model_with_a_template_gives_candidates(tmp_path):
    llama = save_llama(tmp_path / "llama", LLAMA_TEMPLATE)
    config = SynthesizeConfig("o", composed_tasks=1, model_name_or_path=str(llama), max_tokens=40, temperature=2.0)
    sampler = load_sampler(config)
    texts = sampler.sample([{"role": "user", "content": "What is 1 + 1?"}], 16)
    assert len(set(texts)) > 8
    assert len({len(text) for text in texts}) > 4, "replies end with the model's own tokens"
    assert not any(";" in text or "</s>" in text for text in texts)


def test_a_model_without_a_way_to_chat_is_refused(tmp_path, workplace):
    llama = save_llama(tmp_path / "llama", None)
    config = SynthesizeConfig("o", composed_tasks=1, model_name_or_path=str(llama))
    with pytest.raises(ValueError, match=r"has no chat template, and Motif's does not fit: .*lacks the chat tokens"):
        load_sampler(config)
    with pytest.raises(ValueError, match="no model and tokenizer can be loaded"):
        load_sampler(replace(config, model_name_or_path=str(tmp_path)))
    bare = AutoTokenizer.from_pretrained(workplace / "base")
    bare.chat_template = None
    folder = shutil.copytree(workplace / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.jinja"))
    bare.save_pretrained(folder)
    sampler = load_sampler(replace(config, model_name_or_path=str(folder)))
    assert sampler.model.generation_config.eos_token_id == stop_token_ids(sampler.tokenizer)
    assert "<|startofturn|>" in sampler.tokenizer.chat_template


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
    with journal.open("ab") as file:
        file.write('{"task": "cut shör'.encode()[:-2])  # within a character
    with pytest.raises(ValueError, match=r"other settings \(candidates 2 -> 3\)"):
        run_synthesis(config(candidates=3))
    solver.failing = 0
    solver.requests.clear()
    resumed = run_synthesis(config(workers=2)).read_text()
    assert len(solver.requests) == 8 - done
    assert resumed == run_synthesis(config(output_dir=str(tmp_path / "whole"))).read_text()


def test_the_first_tasks_alone_are_solved_where_asked(config):
    tasks, left_out, _ = load_tasks(config(max_tasks=3))
    assert tasks == compose_tasks(0, 8, 2)[:3]
    assert left_out == 0


def test_synthesis_does_not_go_on_with_other_tasks_under_the_same_names(config, solver, write_rows):
    rows = [{"question": f"Start with {number}. What is the result?", "answer": str(number)} for number in range(4)]
    run = config(task_files=[write_rows(rows, "known.jsonl")], composed_tasks=0, workers=1)
    solver.failing = 3
    with pytest.raises(EndpointError):
        run_synthesis(run)
    solver.failing = 0
    write_rows(rows[1:], "known.jsonl")
    with pytest.raises(ValueError, match="other settings \\(digest_of_tasks"):
        run_synthesis(run)
    write_rows(rows, "known.jsonl")
    run_synthesis(run)


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


def test_a_task_that_the_endpoint_refuses_ends_nothing(config, solver, tmp_path, capsys):
    tasks, answer = compose_tasks(0, 8, 2), solver.answer
    refused = tasks[3]

    def choosy(body):
        if body["messages"][0]["content"].startswith(refused.question):
            return 400, {"error": "content filter"}
        return answer(body)

    solver.answer = choosy
    main(words_of(config()))
    report = json.loads((tmp_path / "synthetic" / "report.json").read_text())
    assert report["rejected"]["request refused, status 400"] == 1
    assert refused.identifier in report["unsolved"]
    assert "content filter" in report["refused"][refused.identifier]
    assert len((tmp_path / "synthetic" / JOURNAL_FILE).read_text().splitlines()) == 7
    assert "1 rejected: request refused, status 400" in capsys.readouterr().out


def test_a_restart_that_cannot_write_loses_nothing(config, solver, tmp_path, monkeypatch):
    solver.failing = 5
    words = words_of(config(workers=1))
    with pytest.raises(SystemExit, match="the same command goes on"):
        main(words)
    journal = tmp_path / "synthetic" / JOURNAL_FILE
    before = journal.read_text()
    assert before

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(SystemExit, match=r"cannot be written: No space left .*the same command goes on"):
            main(words)
    assert journal.read_text() == before
    journal.write_text("[1]\n")
    with pytest.raises(SystemExit, match="holds no readable synthesis"):
        main(words)


def test_rows_that_are_no_task_are_reported_or_refused(config, write_rows, tmp_path, capsys):
    path = write_rows([{"question": "How many?"}, {"text": "x", "test_list": []}], "known.jsonl")
    run = config(task_files=[path])
    main(words_of(run))
    report = json.loads((tmp_path / "synthetic" / "report.json").read_text())
    assert report["bad_rows"] == {"neither an answer (math) nor a test_list (code)": 1, "no tests in test_list": 1}
    assert report["bad_row_places"]["no tests in test_list"] == [f"{path}:2"]
    assert "1 rows left out: no tests in test_list" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"known.jsonl:1 is no task: neither an answer"):
        run_synthesis(config(task_files=[path], bad_rows="refuse", output_dir=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"(?s)no task is left.*no tests in test_list \(first: .*known.jsonl:2\)"):
        run_synthesis(config(task_files=[path], composed_tasks=0, output_dir=str(tmp_path / "other")))


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
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0"),
        ({"bad_rows": "drop"}, "bad_rows is 'drop'; use skip or refuse"),
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
