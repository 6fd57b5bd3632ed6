"""A small tokenizer with Motif's markup, rows, a tiny base model and settings, for every test of fine-tuning."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from sft.chat import attach_chat_template
from sft.config import SftStageConfig
from sft.examples import arithmetic_conversations, write_conversations
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


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tokenizer, arithmetic_rows) -> Path:
    """A folder with a tiny base model and its tokenizer, and two files of conversations."""
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    config = Motif2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=2,
        num_noise_heads=1,
        head_dim=8,
    )
    Motif2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_conversations(arithmetic_rows[:120], folder / "train.jsonl")
    write_conversations(arithmetic_rows[120:140], folder / "eval.jsonl")
    return folder


@pytest.fixture
def settings(workplace, tmp_path):
    """Make a stage's settings; keyword arguments win."""

    def make(name="run", **changes) -> SftStageConfig:
        defaults = {
            "model_name_or_path": str(workplace / "base"),
            "output_dir": str(tmp_path / name),
            "train_files": [str(workplace / "train.jsonl")],
            "max_length": 256,
            "learning_rate": 5e-3,
            "max_steps": 4,
            "gradient_accumulation_steps": 2,
            "kernels": "torch",
            "dtype": "float32",
            "gradient_checkpointing": False,
            "use_cpu": True,
            "preview_samples": 0,
            "progress": False,
        }
        return SftStageConfig(**(defaults | changes))

    return make


@pytest.fixture
def endpoint():
    """A local fake of an OpenAI-compatible endpoint; `requests` are what came.

    It sends `replies` in turn, (status, JSON or bytes), with status 0 bytes as they are; or what `answer` makes of a
    request.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, body, self.headers.get("Authorization")))
            status, reply = server.answer(body) if server.answer else server.replies.pop(0)
            if not status:
                self.wfile.write(reply)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies, server.answer = [], [], None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()
    server.server_close()
