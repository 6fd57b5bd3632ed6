"""Where candidate answers come from: an OpenAI-compatible endpoint or a causal LM here; and a model as judge."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = TypeVar("Item")
Result = TypeVar("Result")
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
# What this one request is at fault for: too long, of a form or content that the endpoint does not take.
REFUSED_STATUS = (400, 413, 414, 422, 451)
JUDGE_PROMPT = (
    "Rate the answer from 0 (wrong, incoherent or cut off) to 10 (correct, complete, every step justified). "
    "Reply with the number alone.\n\nQuestion:\n{question}\n\nAnswer:\n{answer}"
)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(?: ?(?:/|out of) ?10\b)?")


class Sampler(Protocol):
    """Anything that answers a conversation."""

    name: str

    def sample(self, messages: list[dict], count: int) -> list[str]:
        """`count` candidate answers to a conversation that ends with a user turn."""


class EndpointError(RuntimeError):
    """The endpoint did not answer as an OpenAI-compatible one does."""


class RequestRefused(EndpointError):
    """The endpoint answers, but not this request; others may pass."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work` makes of it, in order, with up to `workers` of them in work at a time.

    When one fails, those in work beside it come first, so that nothing that was paid for is lost; then its error.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > workers:
                yield from _first_of(waiting)
        while waiting:
            yield from _first_of(waiting)


def _first_of(waiting: deque) -> Iterator[tuple]:
    item, future = waiting.popleft()
    if error := future.exception():
        yield from ((other, beside.result()) for other, beside in waiting if beside.exception() is None)
        raise error
    yield item, future.result()


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint, such as vLLM's.

    Args:
        url: base address, up to and with `/v1`.
        model: model name that the endpoint knows.
        temperature: of the sampling.
        max_tokens: longest answer.
        key_variable: environment variable that holds the key; none is sent where it is not set.
        timeout_seconds: of one request.
        attempts: tries of one request before it fails; pauses double from `pause_seconds`.

    Raises:
        ValueError: `url` is no http address, or `timeout_seconds` is not above 0.
    """

    url: str
    model: str
    temperature: float = 0.8
    max_tokens: int = 2048
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 120.0
    attempts: int = 4
    pause_seconds: float = 1.0

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint address {self.url!r} has no http:// or https://; use http://localhost:8000/v1")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; use seconds above 0")

    @property
    def name(self) -> str:
        """Name that provenance carries."""
        return self.model

    def sample(self, messages: list[dict], count: int) -> list[str]:
        """Ask for `count` answers.

        Raises:
            RequestRefused: the endpoint does not take this conversation.
            EndpointError: no answer after all attempts, or one of another form.
        """
        texts: list[str] = []
        while len(texts) < count:  # some endpoints give one answer whatever `n` says
            texts += self._ask(messages, count - len(texts))
        return texts[:count]

    def _ask(self, messages: list[dict], count: int) -> list[str]:
        body = {"model": self.model, "messages": messages, "n": count}
        body |= {"temperature": self.temperature, "max_tokens": self.max_tokens}
        answer = self._post(json.dumps(body).encode())
        try:
            texts = [_content_text(choice["message"].get("content")) for choice in answer["choices"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise EndpointError(f"{self.url} answered without choices: {answer!r:.300}") from error
        if not texts:
            raise EndpointError(f"{self.url} answered with no choice: {answer!r:.300}")
        return texts

    def _post(self, body: bytes) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause_seconds * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_error_text(error)}"
                if error.code in REFUSED_STATUS:
                    raise RequestRefused(f"{self.url} refused a request ({problem})", error.code) from error
                if error.code not in RETRIED_STATUS:
                    break
            except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke off
                problem = str(error) or type(error).__name__
            except (ValueError, RecursionError) as error:
                raise EndpointError(f"{self.url} answered something that is no JSON: {error}") from error
        raise EndpointError(f"{self.url} gave no answer ({problem}); check the address, the model name and the key")


def _content_text(content: str | list | None) -> str:
    """The text of a reply, which may come in parts.

    Raises:
        AttributeError, KeyError, TypeError: it is something else.
    """
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if not isinstance(content, str | None):
        raise TypeError(f"content is {type(content).__name__}")
    return content or ""


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        return error.read()[:300].decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "no message"


@dataclass(frozen=True)
class LocalModel:
    """A causal LM in this process.

    Args:
        model: in evaluation mode; its generation settings say which tokens end a reply.
        tokenizer: with a chat template.
        temperature: of the sampling; 0 is greedy, and then every candidate is the same.
        max_tokens: longest answer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float = 0.8
    max_tokens: int = 512

    @property
    def name(self) -> str:
        """Name that provenance carries."""
        return self.model.config._name_or_path or type(self.model).__name__

    @torch.no_grad()
    def sample(self, messages: list[dict], count: int) -> list[str]:
        """Generate `count` answers, up to the end of the turn."""
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        stop_ids, padding = self._stop_ids(), self.tokenizer.pad_token_id
        tokens = self.model.generate(
            input_ids=prompt["input_ids"],  # (1, T)
            attention_mask=prompt["attention_mask"],
            num_return_sequences=count if self.temperature else 1,
            max_new_tokens=self.max_tokens,
            eos_token_id=stop_ids or None,
            pad_token_id=stop_ids[0] if padding is None and stop_ids else padding,
            **sampling,
        )[:, prompt["input_ids"].shape[1] :]  # (count, new)
        texts = []
        for row in tokens.tolist():
            ends = [row.index(stop) for stop in stop_ids if stop in row]
            texts.append(self.tokenizer.decode(row[: min(ends, default=len(row))]).strip())
        return texts if self.temperature else texts * count

    def _stop_ids(self) -> list[int]:
        """Ids on which the model says that it ends, else its tokenizer's end of text."""
        stops = self.model.generation_config.eos_token_id
        stops = self.tokenizer.eos_token_id if stops is None else stops
        return stops if isinstance(stops, list) else [] if stops is None else [stops]


@dataclass(frozen=True)
class Judge:
    """A model that rates answers from 0 to 1.

    Args:
        sampler: the model that is asked.
    """

    sampler: Sampler

    def __call__(self, question: str, answer: str) -> float:
        """Rate one answer.

        Raises:
            ValueError: the model's reply is no number from 0 to 10.
        """
        prompt = JUDGE_PROMPT.format(question=question, answer=answer)
        (reply,) = self.sampler.sample([{"role": "user", "content": prompt}], 1)
        found = _NUMBER.findall(reply)
        if not found or not 0 <= float(found[-1]) <= 10:
            raise ValueError(f"judge {self.sampler.name} replied {reply!r:.200}, which is no number from 0 to 10")
        return float(found[-1]) / 10
