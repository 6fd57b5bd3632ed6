"""A small tokenizer with Motif's markup, and rows, for every test of fine-tuning."""

import json

import pytest

from sft.chat import attach_chat_template
from sft.examples import arithmetic_conversations
from trainer.data.arithmetic import generate_problems
from trainer.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def arithmetic_rows() -> list[dict]:
    return arithmetic_conversations(generate_problems(seed=0, count=400))


@pytest.fixture(scope="session")
def tokenizer(arithmetic_rows):
    texts = [message["content"] for row in arithmetic_rows for message in row["messages"]]
    return attach_chat_template(train_tokenizer(texts, vocab_size=400, show_progress=False))


@pytest.fixture
def write_rows(tmp_path):
    """Write rows (dictionaries, or text as it is) as JSON lines; returns the path as text."""

    def write(rows, name="rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write
