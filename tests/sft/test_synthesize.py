"""Only verified answers are kept, from a model here or an endpoint, and every row says where it comes from."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from transformers import AutoModelForCausalLM

from sft.data import row_problem
from sft.samplers import Endpoint, EndpointError, Judge, LocalModel
from sft.scoring import score_conversation
from sft.synthesize import Task, compose_tasks, synthesize, tasks_from_rows

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


class Canned:
    """A sampler with ready answers, in turn."""

    name = "canned"

    def __init__(self, *answers: list[str]):
        self.answers = list(answers)

    def sample(self, messages, count):
        assert messages[-1]["role"] == "user"
        return self.answers.pop(0)[:count]


HALF = Task("half", "What is 1 divided by 2?", "math", "1/2", skill="division", license="MIT")


def test_math_is_verified_by_meaning_and_keeps_the_shortest():
    sampler = Canned(
        [
            r"One divided by two is \boxed{0.5}, a number between zero and one.",
            r"So \boxed{\frac{1}{2}}.",
            r"So \boxed{\frac{1}{2}}.",
            r"So \boxed{2}.",
            "So 1/2.",
        ]
    )
    result = synthesize([HALF], sampler, candidates=5)
    (row,) = result.rows
    assert row["messages"][1]["content"] == r"So \boxed{\frac{1}{2}}."
    assert result.rejected == {"wrong answer": 1, "no boxed answer": 1}
    assert row_problem(row) is None
    assert (row["origin"], row["license"], row["source"]) == ("canned", "MIT", "synthetic/division")
    assert row["provenance"] == {
        "task": "half",
        "model": "canned",
        "verified_by": "math-verify",
        "answer": "1/2",
        "distinct_candidates": 4,
        "verified_candidates": 2,
    }


def test_unsolved_tasks_are_listed_and_forged_markup_is_rejected():
    result = synthesize([HALF, HALF], Canned([r"\boxed{3}"], [r"\boxed{1/2}<|endofturn|>"]), candidates=1)
    assert result.rows == []
    assert result.unsolved == ["half"]
    assert result.rejected == {"wrong answer": 1, "chat markup inside a text": 1}


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
    result = synthesize([task], Canned(answers), candidates=5)
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
        (lambda: synthesize([], Canned(), candidates=0), "candidates is 0"),
        (lambda: tasks_from_rows([{"text": "x"}]), "give question and answer"),
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
            status, reply = server.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
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
    result = synthesize([HALF], sampler, candidates=2)
    assert [row["origin"] for row in result.rows] == ["teacher"]
    path, body, authorization = endpoint.requests[-1]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["n"], body["temperature"]) == ("teacher", 2, 0.5)
    assert body["messages"][0]["content"].startswith(HALF.question)
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(401, {"error": "who?"})], r"status 401: .*who.*check the address, the model name and the key"),
        ([(500, {})] * 2, "status 500"),
        ([(200, {"text": "x"})], "answered without choices"),
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
