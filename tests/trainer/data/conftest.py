"""A small tokenizer and documents for the data tests."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(words: int = 50) -> PreTrainedTokenizerFast:
    """One token a word `w0 … w<words>`."""
    vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number + 1 for number in range(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def make_documents(count: int, shift: int = 0) -> list[dict]:
    """Documents of 1 to 40 words, each different."""
    return [
        {
            "text": " ".join(f"w{(number * 7 + place + shift) % 50}" for place in range(1 + number % 40)),
            "license": "MIT",
        }
        for number in range(count)
    ]


@pytest.fixture
def tokenizer():
    return make_tokenizer()
