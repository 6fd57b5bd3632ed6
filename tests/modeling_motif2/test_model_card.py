"""The README.md of a saved model: what it says of the model, and that its example runs."""

import builtins

import pytest
import transformers
from transformers import AutoTokenizer

from modeling_motif2.model_card import write_model_card
from tests.modeling_motif2.builders import random_ids, small_model


def test_the_model_card_says_what_is_known(tmp_path):
    small_model().save_pretrained(tmp_path / "my-model")
    card = (tmp_path / "my-model" / "README.md").read_text()
    assert "4 signal and 2 noise heads in 2 groups" in card
    assert "Not recorded by whoever saved this model." in card
    assert "Weights: not stated" in card
    write_model_card(
        tmp_path / "my-model",
        training="Pre-trained on nothing much.",
        license="apache-2.0",
        evaluation={"gsm8k": {"exact_match": 0.5}},
    )
    card = (tmp_path / "my-model" / "README.md").read_text()
    assert "| gsm8k | exact_match | 0.5 |" in card
    assert "license: apache-2.0" in card
    assert "Pre-trained on nothing much." in card
    small_model().save_pretrained(tmp_path / "my-model")
    assert "nothing much" in (tmp_path / "my-model" / "README.md").read_text()


class Tokenizer:
    """Gives the same ids for every text, and ids for text."""

    def __call__(self, text, return_tensors):
        return {"input_ids": random_ids(1, 5)}

    def decode(self, ids):
        return ids.tolist()


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ForCausalLM", "text-generation"),
        ("ForSequenceClassification", "text-classification"),
        ("ForTokenClassification", "token-classification"),
        ("ForQuestionAnswering", "question-answering"),
        ("", "feature-extraction"),
    ],
)
@pytest.mark.parametrize("layout", ["motif2", "official"])
def test_the_example_of_the_model_card_runs(tmp_path, monkeypatch, layout, head, task):
    model = getattr(transformers, f"AutoModel{head}").from_config(small_model().config)
    model.save_pretrained(tmp_path, layout=layout)
    card = (tmp_path / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/or/repository", str(tmp_path))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: Tokenizer())
    monkeypatch.setattr(builtins, "print", lambda shown: found.append(shown))
    found = []
    exec(code)
    assert len(found) == 1
