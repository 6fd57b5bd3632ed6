"""The server finds our class, and a served model answers and stops where its turn ends."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from transformers.cli.serving import model_manager

from modeling_motif2 import Motif2ForCausalLM
from sft import serve


def test_transformers_finds_the_class_and_gets_every_word(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.setattr(serve, "transformers_cli", lambda: seen.extend(sys.argv))
    serve.main(["folder", "--port", "8123"])
    assert seen == ["transformers", "serve", "folder", "--port", "8123"]
    assert model_manager.transformers.Motif2ForCausalLM is Motif2ForCausalLM


@pytest.mark.slow
def test_a_served_model_answers_over_http(workplace, tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="needs transformers[serving]")
    pytest.importorskip("openai", reason="needs transformers[serving]")
    monkeypatch.setattr(sys, "argv", ["python"])
    words = [str(workplace / "base"), "--device", "cpu", "--port", "8127"]
    threading.Thread(target=serve.main, args=(words,), daemon=True).start()
    body = {"model": words[0], "messages": [{"role": "user", "content": "What is 1 + 1?"}], "max_tokens": 4}
    request = urllib.request.Request(
        "http://localhost:8127/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(60):
        try:
            answer = json.loads(opener.open(request, timeout=60).read())
            break
        except urllib.error.URLError:
            time.sleep(1)
    else:
        pytest.fail("the server did not come up within a minute")
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert 1 <= answer["usage"]["completion_tokens"] <= 4
