"""No backend cuts a prompt unasked: what exceeds the window is refused, and an answer ends with the window."""

import pytest
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from eval_harness.backends import load_backend


class CuttingLM(TemplateLM):
    """Cuts from the left what exceeds its window, as lm-eval's models do; a word is a token."""

    _max_gen_toks = 256  # an API has no other
    tokenized_requests = True

    def __init__(self, model, batch_size, max_length=8, truncate=False, max_batch_size=None, device=None):
        super().__init__()
        self.max_length = int(max_length)
        self._truncate = truncate

    @property
    def eot_token_id(self):
        return 0

    def tok_encode(self, string, **options):
        return string.split()

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            prompt, options = request.args
            kept = self.tok_encode(prompt)[-(self.max_length - options["max_gen_toks"]) :]
            answers.append(f"{' '.join(kept)} {options['max_gen_toks']}")
        return answers

    def _loglikelihood_tokens(self, requests, **options):
        return [(0.0, True) for _ in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise AssertionError("no whole text is scored here")


@pytest.fixture(autouse=True)
def cutting_backend(monkeypatch):
    monkeypatch.setattr(registry, "get_model", lambda name: CuttingLM)


def asked(prompt, tokens):
    return [Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": tokens}), 0)]


def test_prompts_stay_whole_and_answers_end_with_the_window():
    lm = load_backend("cutting", "m", {"max_length": 8}, 2)
    assert lm.generate_until(asked("a b c", 5)) == ["a b c 5"]
    assert lm.generate_until(asked("a b c d e f", 100)) == ["a b c d e f 2"]
    with pytest.raises(ValueError, match=r"need 9 tokens, the model's window has 8"):
        lm.generate_until(asked("a b c d e f g h", 1))
    assert lm._loglikelihood_tokens([(("", ""), [1] * 4, [2] * 3)]) == [(0.0, True)]
    with pytest.raises(ValueError, match=r"need 9 tokens, the model's window has 8"):
        lm._loglikelihood_tokens([(("", ""), [1] * 4, [2] * 4)])


def test_prompts_are_cut_where_that_is_asked_for():
    lm = load_backend("cutting", "m", {"max_length": 8, "truncate": True}, 2)
    assert lm.generate_until(asked("a b c d e f", 5)) == ["d e f 5"]


def test_an_api_that_gets_tokens_must_be_told_its_window():
    with pytest.raises(ValueError, match=r"lm-eval would take 9: state it \(`--model_args max_length=N`\)"):
        load_backend("cutting", "m", {}, 2)
