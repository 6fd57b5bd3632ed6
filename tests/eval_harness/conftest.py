"""A tiny model and tokenizer, and small made-up sets, shared by the evaluation tests."""

import json

import pytest
import torch

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.data.tokenizer import train_tokenizer

DOMAIN_TEXTS = {
    "general": "The library opens at nine and the librarian reads aloud to whoever comes in from the rain.",
    "code": "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))",
    "math": "Question: What is 12 + 7?\nAnswer: 2 + 7 = 9, so 12 + 7 = 19.\n#### 19",
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = [*DOMAIN_TEXTS.values(), "0123456789 the answer is"] * 4
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    torch.manual_seed(0)
    config = Motif2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=4,
        num_noise_heads=2,
        head_dim=8,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Motif2ForCausalLM(config).double().eval()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_data")
    rows = [
        {"question": f"What is {a} + {a + 3}?", "answer": f"{a} + {a + 3} = {2 * a + 3}.\n#### {2 * a + 3}"}
        for a in range(10, 22)
    ]
    write_rows(folder / "arithmetic.jsonl", rows)
    for domain, text in DOMAIN_TEXTS.items():
        write_rows(folder / f"heldout_{domain}.jsonl", [{"text": text[skip:]} for skip in range(0, 20, 5)])
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
