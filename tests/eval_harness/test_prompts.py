"""Prompts of our tasks where a score hangs on them: examples and their order, choices, stop sequences."""

import pytest

from eval_harness.loading import load_tasks
from tests.eval_harness.benchmark_sets import write_benchmarks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def first_prompt(name, data_dir):
    """Task, the prompt of its first row, and the generation settings."""
    _, (loaded,), _ = load_tasks([name], data_dir)
    task = loaded.get_all_tasks()[0] if hasattr(loaded, "get_all_tasks") else loaded
    row = next(iter(task.eval_docs))
    prompt = task.fewshot_context(row, num_fewshot=task.config.num_fewshot)
    return prompt, task.config.generation_kwargs


def test_gsm8k_and_math_end_before_the_next_problem(data_dir):
    for name, opening, length, tokens in (
        ("motif2_gsm8k_8shot", "Q:", 9, 512),
        ("motif2_gsm8k_4shot", "Q:", 5, 512),
        ("motif2_math_4shot::algebra", "Problem:", 5, 1024),
    ):
        prompt, generation = first_prompt(name, data_dir)
        assert prompt.count(opening) == length
        assert opening in generation["until"]
        assert (generation["max_gen_toks"], generation["do_sample"]) == (tokens, False)


def test_mbpp_shows_its_authors_three_problems(data_dir):
    prompt, generation = first_prompt("motif2_mbpp_3shot", data_dir)
    assert [f"Add {n}. Your code" in prompt for n in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    assert "[BEGIN]\ndef add(x):\n    return x + 2\n[DONE]\n" in prompt
    assert prompt.endswith("assert add(2) == 12\n[BEGIN]\n")
    assert "[DONE]" in generation["until"]


def test_humaneval_ends_with_the_function(data_dir):
    prompt, generation = first_prompt("motif2_humaneval", data_dir)
    assert prompt == 'def add0(x):\n    """Adds 0 for each of x steps."""\n'
    assert {"\nclass", "\ndef", "\n#", "\nif", "\nprint"} <= set(generation["until"])
    assert generation["max_gen_toks"] == 1024


def test_mmlu_shows_the_development_split_and_asks_for_a_letter(data_dir):
    prompt, _ = first_prompt("motif2_mmlu_5shot::anatomy", data_dir)
    header = "The following are multiple choice questions (with answers) about anatomy."
    assert prompt.startswith(f"{header}\n\nWhich is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\n")
    assert [prompt.count(f"Which is {n}?") for n in range(5)] == [2, 1, 1, 1, 1]
    assert prompt.endswith("Which is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:")
    chat, _ = first_prompt("motif2_mmlu_chat::anatomy", data_dir)
    assert chat.startswith("Which is 0?\nA. 0\nB. 1\nC. 2\nD. 3\n\n")


def test_a_row_changes_decoding_and_the_shots_of_tasks_that_are_not_ours(data_dir, monkeypatch):
    name = "motif2_gsm8k_8shot"
    changes = {"shots": {name: 2}, "generation": {name: {"max_gen_toks": 7}}}
    _, (ours,), _ = load_tasks([name], data_dir, **changes)
    assert (ours.config.num_fewshot, ours.config.generation_kwargs["max_gen_toks"]) == (8, 7)
    assert "Q:" in ours.config.generation_kwargs["until"]
    monkeypatch.setattr("eval_harness.loading.OUR_PREFIX", "ours_")
    _, (theirs,), _ = load_tasks([name], data_dir, **changes)
    assert theirs.config.num_fewshot == 2
