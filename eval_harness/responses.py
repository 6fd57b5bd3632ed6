"""Put every response of a model on disk as soon as it is there, and never ask for the same one twice.

Requests are sorted by length and asked for in chunks, a batch of generations each; a chunk's responses are appended to
`responses.jsonl` before the next chunk starts. After an interruption the same run asks only for what is not on file.
Sampling is seeded by chunk, and the chunks do not depend on what is on file, so a resumed run gives what an
uninterrupted one gives.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from eval_harness.answers import after_thinking

# A context's choices are scored in one pass, so a batch of them takes several batches of requests.
CHUNK_BATCHES = {"generate_until": 1, "loglikelihood": 4, "loglikelihood_rolling": 1}
LABELS = {"generate_until": "generating", "loglikelihood": "scoring choices", "loglikelihood_rolling": "scoring text"}


class RecordedLM(LM):
    """An lm-eval model whose responses are kept on file, with one progress bar over all requests.

    Args:
        inner: the model that is asked.
        folder: where `responses.jsonl` goes (`responses.rank1.jsonl` on the second process, …); None keeps no file.
        identity: what must agree for responses to be used again (model, tokenizer, seed).
        batch_size: sequences at a time inside; a chunk is `CHUNK_BATCHES` of them.
        cut_thinking: hand on only what follows a model's thinking; the file keeps all.

    Raises:
        ValueError: the folder holds responses of another identity, or a line that is no response.
    """

    def __init__(self, inner: LM, folder: Path | None, identity: dict, batch_size: int, cut_thinking: bool = False):
        super().__init__()
        self.inner = inner
        self.seed = int(identity.get("seed", 0))
        self.batch_size = batch_size
        self.cut_thinking = cut_thinking
        self.responses: dict[str, object] = {}
        self.used: dict[str, object] = {}
        self.num_reused = 0
        self.file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("responses*.jsonl")):
                self.responses |= _read_responses(path, identity)
            name = f"responses.rank{inner.rank}.jsonl" if inner.rank else "responses.jsonl"
            self.file = _open_for_append(folder / name, identity)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = self._ask("generate_until", requests)
        return [after_thinking(text).lstrip() for text in texts] if self.cut_thinking else texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [tuple(response) for response in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._ask("loglikelihood_rolling", requests)

    def _ask(self, kind: str, requests: list[Instance]) -> list:
        keys = request_keys(kind, requests)
        if kind == "generate_until" and hasattr(self.inner, "_create_payload"):
            requests = self._with_seeds(requests)
        contexts = [request.args[0] for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (-len(contexts[index]), contexts[index], keys[index]))
        size = CHUNK_BATCHES[kind] * self.batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        missing = [[index for index in chunk if keys[index] not in self.responses] for chunk in chunks]
        unfinished = [chunk for chunk in missing if chunk]
        done = len(requests) - sum(map(len, unfinished))
        self.num_reused += done
        bar = tqdm(total=len(requests), initial=done, desc=LABELS[kind], unit="row", disable=self.rank != 0)
        for chunk in unfinished:
            answers = self._ask_chunk(kind, [requests[index] for index in chunk], [keys[index] for index in chunk])
            for index, answer in zip(chunk, answers, strict=True):
                self._keep(keys[index], answer)
            if self.file is not None:
                self.file.flush()
            bar.update(len(chunk))
        bar.close()
        self._wait_for_slower_ranks(kind, requests, keys, len(unfinished))
        self.used |= {key: self.responses[key] for key in keys}
        return [self.responses[key] for key in keys]

    def _with_seeds(self, requests: list[Instance]) -> list[Instance]:
        """Requests to an API, each repeat with a seed of its own: lm-eval sends one and the same, for one answer."""
        seeds = [f"{self.seed}:{self.inner._seed}:{number}" for number in repeat_numbers(requests)]
        numbers = [int.from_bytes(hashlib.sha256(seed.encode()).digest()[:3], "big") for seed in seeds]
        return [
            replace(request, arguments=(request.args[0], {**request.args[1], "seed": number}))
            for request, number in zip(requests, numbers, strict=True)
        ]

    def _ask_chunk(self, kind: str, requests: list[Instance], keys: list[str]) -> list:
        digest = hashlib.sha256("".join([str(self.seed), *keys]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        return getattr(self.inner, kind)(requests, disable_tqdm=True)

    def _wait_for_slower_ranks(self, kind: str, requests: list[Instance], keys: list[str], num_calls: int) -> None:
        """Ask again until every process made as many calls: some models talk to each other in each call."""
        if self.world_size == 1 or not requests:
            return
        most = int(self.all_gather(torch.tensor([num_calls], device=self.device)).max())
        for _ in range(most - num_calls):
            self._ask_chunk(kind, requests[:1], keys[:1])

    def _keep(self, key: str, response: object) -> None:
        self.responses[key] = response
        if self.file is not None:
            self.file.write(json.dumps({"key": key, "response": response}) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def world_size(self) -> int:
        return self.inner.world_size

    @property
    def device(self):
        return self.inner.device

    @property
    def tokenizer_name(self) -> str:
        return self.inner.tokenizer_name

    def all_gather(self, tensor):
        return self.inner.all_gather(tensor)

    def gather_object(self, obj, dst=0):
        return self.inner.gather_object(obj, dst)

    def barrier(self) -> None:
        self.inner.barrier()

    def chat_template(self, chat_template=False):
        return self.inner.chat_template(chat_template)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.inner.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def request_keys(kind: str, requests: Sequence[Instance]) -> list[str]:
    """A name for each request from what is asked; the second asking of the same gets another name."""
    numbers = repeat_numbers(requests)
    asked = [json.dumps([kind, *request.args], sort_keys=True, default=str) for request in requests]
    return [
        hashlib.sha256(f"{number + 1}:{text}".encode()).hexdigest()[:32]
        for number, text in zip(numbers, asked, strict=True)
    ]


def repeat_numbers(requests: Sequence[Instance]) -> list[int]:
    """How often each request was made before, among these."""
    seen: Counter = Counter()
    numbers = []
    for request in requests:
        asked = json.dumps(request.args, sort_keys=True, default=str)
        numbers.append(seen[asked])
        seen[asked] += 1
    return numbers


def _read_responses(path: Path, identity: dict) -> dict[str, object]:
    """Responses on file, but for a torn last line that an interruption left.

    Raises:
        ValueError: they belong to another run, or the file is no record of responses.
    """
    *whole, _ = path.read_bytes().split(b"\n")
    if not whole:
        return {}
    try:
        head, *rows = [json.loads(line) for line in whole]
        found = head["identity"]
        responses = {row["key"]: row["response"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of responses ({error!r}); use another output folder") from error
    if found != identity:
        raise ValueError(f"{path} holds responses of {found}, this run is {identity}; use another output folder")
    return responses


def _open_for_append(path: Path, identity: dict):
    """Open a process's own file behind its last whole line; only its owner may cut a torn one."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    file = path.open("a", encoding="utf-8")
    if file.tell() == 0:
        file.write(json.dumps({"identity": identity}) + "\n")
        file.flush()
    return file
