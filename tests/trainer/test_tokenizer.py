"""The tokenizer loses nothing, splits digits, keeps the markup whole and survives a save."""

import pytest
from transformers import AutoTokenizer

from trainer.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "The quick brown fox saw 1234 birds. Größe, 한국어, 🦊."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, show_progress=False)


@pytest.mark.parametrize("text", [*TEXTS[:2], "", " \n\t x  ", "\x00\x7f", "unseen: ßöñ 漢字"])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_and_markup_is_whole(tokenizer):
    assert len(tokenizer.encode("90210", add_special_tokens=False)) == 5
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.bos_token == "<|beginoftext|>"


def test_saved_tokenizer_reloads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert len(reloaded) == len(tokenizer) <= 400


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 400, show_progress=False)
