"""Texts to tokens, in this process or in several, always in the order they came."""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

BATCHES_AHEAD = 4  # of each worker, assumption
Encode = Callable[[Iterable[list[dict]]], Iterator[tuple[list[dict], list[list[int]]]]]

_tokenizer = None


@contextlib.contextmanager
def encoder(tokenizer, num_workers: int) -> Iterator[Encode]:
    """A function that turns batches of documents into pairs of a batch and its tokens.

    Args:
        tokenizer: a fast tokenizer; it uses all cores for a batch unless TOKENIZERS_PARALLELISM forbids it.
        num_workers: processes; with one the work stays in this process. More help where reading and encoding small
            documents, not the tokenizer, takes the time.
    """
    if num_workers == 1:
        yield lambda batches: ((batch, encode_texts(tokenizer, _texts(batch))) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # a forked tokenizer may hold locks of threads that are gone
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (tokenizer,))
    try:
        yield lambda batches: _in_order(pool, batches, BATCHES_AHEAD * num_workers)
    finally:
        pool.shutdown(cancel_futures=True)


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens of each text, without special ones."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _in_order(pool: ProcessPoolExecutor, batches: Iterable[list[dict]], ahead: int) -> Iterator:
    waiting: deque = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode_in_worker, _texts(batch))))
        if len(waiting) > ahead:
            batch, future = waiting.popleft()
            yield batch, future.result()
    while waiting:
        batch, future = waiting.popleft()
        yield batch, future.result()


def _texts(batch: list[dict]) -> list[str]:
    return [document["text"] for document in batch]


def _start_worker(tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _encode_in_worker(texts: list[str]) -> list[list[int]]:
    return encode_texts(_tokenizer, texts)
