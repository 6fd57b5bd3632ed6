"""Demo tasks score what they say, raw and in chat markup, whatever the batch size."""

import itertools
import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from eval_harness.evaluate import evaluate, load_tasks, wrap_model
from tests.eval_harness.benchmark_sets import write_benchmarks

TASKS = ["motif2_arithmetic", "motif2_heldout_general", "motif2_heldout_code", "motif2_heldout_math"]


class ScriptedLM(LM):
    """Answers every prompt with what `answer(row)` returns."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise AssertionError("no multiple choice is asked here")

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-float(len(request.args[0].encode())) for request in requests]


def test_arithmetic_counts_only_the_number_after_the_hashes(demo_data):
    right = evaluate(ScriptedLM(lambda row: row["answer"]), None, TASKS[:1], data_dir=demo_data)
    assert right.metrics["motif2_arithmetic"]["exact_match"] == 1.0
    assert right.num_samples["motif2_arithmetic"] == 12
    unmarked = evaluate(ScriptedLM(lambda row: row["answer"].replace("#", "")), None, TASKS[:1], data_dir=demo_data)
    assert unmarked.score("motif2_arithmetic") == 0.0
    wrong = evaluate(ScriptedLM(lambda row: row["answer"] + "1"), None, TASKS[:1], data_dir=demo_data)
    assert wrong.score("motif2_arithmetic") == 0.0


def test_heldout_loss_is_in_bits_per_byte(demo_data):
    result = evaluate(ScriptedLM(str), None, TASKS[1:2], data_dir=demo_data)
    assert result.metrics["motif2_heldout_general"]["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert result.metrics["motif2_heldout_general"]["byte_perplexity"] == pytest.approx(math.e)


def test_a_model_is_scored_like_by_hand(demo_data, tiny_model, tokenizer):
    result = evaluate(tiny_model, tokenizer, TASKS[1:2], data_dir=demo_data, limit=1)
    text = result.samples["motif2_heldout_general"][0]["doc"]["text"]
    ids = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logits = tiny_model(ids).logits.log_softmax(-1)
    loss = -logits[0, :-1].gather(-1, ids[0, 1:, None]).sum().item()
    expected = loss / math.log(2) / len(text.encode())
    assert result.score("motif2_heldout_general", "bits_per_byte") == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="has the metrics"):
        result.score("motif2_heldout_general")


def test_chat_markup_replaces_the_raw_prompt(demo_data, tiny_model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    try:
        chat = evaluate(tiny_model, tokenizer, TASKS[:1], data_dir=demo_data, limit=2, apply_chat_template=True)
        raw = evaluate(tiny_model, tokenizer, TASKS[:1], data_dir=demo_data, limit=2)
    finally:
        tokenizer.chat_template = None
    prompts = [result.samples["motif2_arithmetic"][0]["arguments"][0][0] for result in (chat, raw)]
    assert prompts == ["<user>What is 10 + 13?<assistant>", "Question: What is 10 + 13?\nAnswer:"]


def test_worked_examples_are_turns_of_a_chat(tmp_path, tiny_model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    options = {"data_dir": write_benchmarks(tmp_path), "limit": 1, "generation_options": {"max_gen_toks": 1}}
    task = "motif2_math_4shot::algebra"
    try:
        result = evaluate(tiny_model, tokenizer, [task], apply_chat_template=True, **options)
    finally:
        tokenizer.chat_template = None
    prompt = result.samples[task][0]["arguments"][0][0]
    assert (prompt.count("<user>Problem:"), prompt.count("<assistant>")) == (5, 5)


def test_no_chat_template_is_refused(demo_data, tiny_model, tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(tiny_model, tokenizer, TASKS[:1], data_dir=demo_data, apply_chat_template=True)


@pytest.mark.slow
def test_batch_size_changes_no_answer(demo_data, tiny_model, tokenizer):
    options = {"data_dir": demo_data, "limit": 6}
    results = [evaluate(tiny_model, tokenizer, TASKS, batch_size=size, **options) for size in (1, 4, 6)]
    answers = [[row["resps"] for row in result.samples["motif2_arithmetic"]] for result in results]
    assert len({row[0][0] for row in answers[0]}) > 1, "an answer that never changes proves nothing"
    assert answers[0] == answers[1] == answers[2]
    for task in TASKS[1:]:
        for metric, score in results[0].metrics[task].items():
            assert [result.metrics[task][metric] for result in results[1:]] == pytest.approx([score, score], rel=1e-9)


def test_batch_size_changes_no_choice(tmp_path, tiny_model, tokenizer):
    data = write_benchmarks(tmp_path)
    found = []
    for size in (1, 3):
        result = evaluate(tiny_model, tokenizer, ["motif2_mmlu_5shot::anatomy"], data_dir=data, batch_size=size)
        found.append([row["resps"] for row in result.samples["motif2_mmlu_5shot::anatomy"]])
    likelihoods = [[float(choice[0][0]) for row in rows for choice in row] for rows in found]
    assert len(set(likelihoods[0])) == len(likelihoods[0]) == 8
    assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-9)


def test_the_end_of_thinking_is_seen_though_it_is_a_special_token(tiny_model, tokenizer):
    lm = wrap_model(tiny_model, tokenizer, 1)
    ids = tokenizer("<think>4</think>5<|endofturn|>", add_special_tokens=False)["input_ids"]
    assert lm.tok_decode(ids) == "4</think>5"
    assert lm.tok_decode(ids[:1]) == ""


def test_a_stop_sequence_that_is_a_special_token_ends_its_row_whatever_the_batch_size(
    tokenizer, tiny_model, monkeypatch
):
    """The checkpoint knows another end, and the other row of the batch goes on for longer."""
    after = dict(itertools.pairwise(tokenizer.convert_tokens_to_ids([*"15", "<|endofturn|>", "9"])))
    after |= dict(itertools.pairwise(tokenizer.convert_tokens_to_ids([*"23468", "<|endoftext|>"])))
    nine = tokenizer.convert_tokens_to_ids("9")
    forward = type(tiny_model).forward

    def scripted(self, input_ids, **options):
        output = forward(self, input_ids=input_ids, **options)
        following = torch.tensor([[after.get(int(row[-1]), nine)] for row in input_ids])  # (B, 1)
        output.logits = torch.nn.functional.one_hot(following, output.logits.shape[-1]).double()  # (B, 1, V)
        return output

    monkeypatch.setattr(type(tiny_model), "forward", scripted)
    options = {"until": ["<|endofturn|>"], "do_sample": False, "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, (prompt, options), 0) for prompt in "12"]
    for size in (1, 2):
        assert wrap_model(tiny_model, tokenizer, size).generate_until(asked, disable_tqdm=True) == ["5", "3468"]


def test_answers_end_with_the_window_and_longer_prompts_are_refused(demo_data, tmp_path, tiny_model, tokenizer):
    options = {"data_dir": demo_data, "limit": 1, "generation_options": {"max_gen_toks": 2**20}}
    narrow = wrap_model(tiny_model, tokenizer, 1, max_length=40)
    (row,) = evaluate(narrow, None, TASKS[:1], **options).samples["motif2_arithmetic"]
    options["generation_options"] = {"max_gen_toks": 40 - len(narrow.tok_encode(row["arguments"][0][0]))}
    wide = wrap_model(tiny_model, tokenizer, 1)
    assert (
        row["resps"] == evaluate(wide, None, TASKS[:1], **options).samples["motif2_arithmetic"][0]["resps"] != [[""]]
    )
    tight = wrap_model(tiny_model, tokenizer, 1, max_length=8)
    with pytest.raises(ValueError, match="the model's window has 8"):
        evaluate(tight, None, TASKS[:1], **options)
    with pytest.raises(ValueError, match="the model's window has 8"):
        evaluate(tight, None, ["motif2_mmlu_5shot::anatomy"], data_dir=write_benchmarks(tmp_path))
    assert evaluate(tight, None, TASKS[1:2], data_dir=demo_data), "a whole text is scored window by window"
    cut = wrap_model(tiny_model, tokenizer, 1, max_length=8, truncation=True)
    assert evaluate(cut, None, TASKS[:1], data_dir=demo_data, limit=1, generation_options={"max_gen_toks": 2})


def test_a_model_is_loaded_only_once_the_rows_are_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"arithmetic\.jsonl"):
        evaluate(lambda: pytest.fail("loaded too early"), None, TASKS[:1], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("tasks", "data", "message"),
    [
        (["motif2_arithmetik"], True, "did you mean 'motif2_arithmetic'"),
        ([], True, "no task is named"),
        (["motif2_arithmetic"], False, "arithmetic.jsonl"),
    ],
)
def test_bad_input_names_the_mend(tmp_path, demo_data, tasks, data, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_tasks(tasks, demo_data if data else tmp_path)
