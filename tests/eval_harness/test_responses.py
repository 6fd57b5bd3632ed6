"""Responses are kept at once, asked for once, and never mixed up with another run's."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from eval_harness.responses import RecordedLM, request_keys

IDENTITY = {"model": "counting", "seed": 3}


class CountingLM(LM):
    """Says each prompt back with a random number; breaks down after `breaks_after` calls."""

    def __init__(self, breaks_after=None):
        super().__init__()
        self.calls = []
        self.breaks_after = breaks_after

    def generate_until(self, requests, disable_tqdm=False):
        if len(self.calls) == self.breaks_after:
            raise KeyboardInterrupt
        self.calls.append([request.args[0] for request in requests])
        return [f"{request.args[0]} {torch.rand(()).item():.6f}" for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(-1.5, True) for _ in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-2.5 for _ in requests]


def asked(*prompts):
    return [Instance("generate_until", {}, (prompt, {"until": ["\n"]}), 0) for prompt in prompts]


PROMPTS = [f"{'x' * number} {number}" for number in range(20)]


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
    whole = RecordedLM(CountingLM(), tmp_path / "whole", IDENTITY, batch_size=1).generate_until(asked(*PROMPTS))
    broken = RecordedLM(CountingLM(breaks_after=3), tmp_path / "broken", IDENTITY, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        broken.generate_until(asked(*PROMPTS))
    broken.close()
    inner = CountingLM()
    resumed = RecordedLM(inner, tmp_path / "broken", IDENTITY, batch_size=1)
    assert resumed.generate_until(asked(*PROMPTS)) == whole
    assert (len(inner.calls), resumed.num_reused) == (17, 3)
    again = RecordedLM(CountingLM(breaks_after=0), tmp_path / "broken", IDENTITY, batch_size=1)
    assert again.generate_until(asked(*PROMPTS)) == whole


def test_another_seed_draws_other_samples():
    drawn = [
        RecordedLM(CountingLM(), None, {"seed": seed}, batch_size=4).generate_until(asked(*PROMPTS))
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_no_finished_response_is_asked_for_again_whatever_the_batch_size(tmp_path):
    broken = RecordedLM(CountingLM(breaks_after=3), tmp_path, IDENTITY, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        broken.generate_until(asked(*PROMPTS))
    broken.close()
    finished = {prompt for call in broken.inner.calls for prompt in call}
    inner = CountingLM()
    resumed = RecordedLM(inner, tmp_path, IDENTITY, batch_size=4)
    resumed.generate_until(asked(*PROMPTS))
    assert len(finished) == resumed.num_reused == 9
    assert sorted(prompt for call in inner.calls for prompt in call) == sorted(set(PROMPTS) - finished)


def test_thinking_is_kept_on_file_and_cut_from_what_is_scored(tmp_path):
    class Thinking(CountingLM):
        def generate_until(self, requests, disable_tqdm=False):
            return ["<think>4</think>\n\n5" for _ in requests]

    for _ in range(2):
        recorded = RecordedLM(Thinking(), tmp_path, IDENTITY, batch_size=1, cut_thinking=True)
        assert recorded.generate_until(asked("a")) == ["5"]
        recorded.close()
    assert "<think>4</think>" in (tmp_path / "responses.jsonl").read_text()
    whole = RecordedLM(Thinking(), None, IDENTITY, batch_size=1)
    whole.inner.generate_until = lambda requests, disable_tqdm=False: ["    return x"]
    assert whole.generate_until(asked("def f(x):")) == ["    return x"], "a continuation keeps its indentation"


def test_choices_of_one_context_are_asked_for_together():
    inner = CountingLM()
    groups = []
    inner.loglikelihood = lambda requests, disable_tqdm=False: groups.append(requests) or [(0.0, True)] * len(requests)
    contexts = [f"context {number}" for number in range(8)]
    requests = [Instance("loglikelihood", {}, (context, letter), 0) for letter in "ABCD" for context in contexts]
    RecordedLM(inner, None, IDENTITY, batch_size=2).loglikelihood(requests)
    assert [len({request.args[0] for request in group}) for group in groups] == [2, 2, 2, 2]


def test_a_torn_last_line_is_asked_for_again(tmp_path):
    first = RecordedLM(CountingLM(), tmp_path, IDENTITY, batch_size=1)
    answers = first.generate_until(asked(*PROMPTS[:4]))
    first.close()
    path = tmp_path / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    inner = CountingLM()
    resumed = RecordedLM(inner, tmp_path, IDENTITY, batch_size=1)
    assert resumed.generate_until(asked(*PROMPTS[:4])) == answers
    assert inner.calls == [[PROMPTS[0]]]
    resumed.close()
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_torn_first_line_is_written_again(tmp_path):
    (tmp_path / "responses.jsonl").write_bytes(b'{"identity": {"mod')
    for _ in range(2):
        recorded = RecordedLM(CountingLM(), tmp_path, IDENTITY, batch_size=1)
        recorded.generate_until(asked("a"))
        recorded.close()
    assert recorded.num_reused == 1


def test_only_its_owner_cuts_a_torn_line(tmp_path):
    """Another process may be writing to its file while this one reads it."""
    other = CountingLM()
    other._rank = 1
    RecordedLM(other, tmp_path, IDENTITY, batch_size=1).generate_until(asked("a"))
    path = tmp_path / "responses.rank1.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "half')
    torn = path.read_bytes()
    first = RecordedLM(CountingLM(), tmp_path, IDENTITY, batch_size=1)
    assert (path.read_bytes(), len(first.responses)) == (torn, 1)
    RecordedLM(other, tmp_path, IDENTITY, batch_size=1).close()
    assert path.read_bytes() == torn[: -len(b'{"key": "half')]


def test_repeats_of_one_prompt_get_answers_of_their_own():
    recorded = RecordedLM(CountingLM(), None, IDENTITY, batch_size=2)
    assert len(set(recorded.generate_until(asked("a", "a", "a")))) == 3
    assert len(set(request_keys("generate_until", asked("a", "a", "b")))) == 3


def test_repeats_reach_an_api_with_seeds_of_their_own():
    """An API answers a prompt and a seed always the same; lm-eval sends one seed with all."""

    class Api(CountingLM):
        _seed = 1234
        _create_payload = None

        def generate_until(self, requests, disable_tqdm=False):
            return [f"{request.args[0]} {request.args[1]['seed']}" for request in requests]

    def answers(seed):
        return RecordedLM(Api(), None, {"seed": seed}, batch_size=2).generate_until(asked("a", "a", "b", "a"))

    first = answers(3)
    assert len(set(first)) == 4
    assert first[0].split()[1] == first[2].split()[1], "first askings share a seed, so that an API may batch them"
    assert answers(3) == first
    assert not set(answers(4)) & set(first)


def test_all_kinds_come_back_from_file_as_they_were(tmp_path):
    requests = [Instance("loglikelihood", {}, ("a", "b"), 0)]
    rolling = [Instance("loglikelihood_rolling", {}, ("a",), 0)]
    for _ in range(2):
        recorded = RecordedLM(CountingLM(), tmp_path, IDENTITY, batch_size=2)
        assert recorded.loglikelihood(requests) == [(-1.5, True)]
        assert recorded.loglikelihood_rolling(rolling) == [-2.5]
        recorded.close()


@pytest.mark.parametrize("identity", [{"model": "other", "seed": 3}, {"model": "counting", "seed": 4}])
def test_responses_of_another_run_are_refused(tmp_path, identity):
    RecordedLM(CountingLM(), tmp_path, IDENTITY, batch_size=1).close()
    with pytest.raises(ValueError, match="use another output folder"):
        RecordedLM(CountingLM(), tmp_path, identity, batch_size=1)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "responses.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="is no record of responses"):
        RecordedLM(CountingLM(), tmp_path, IDENTITY, batch_size=1)
