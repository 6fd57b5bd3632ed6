"""`generate` without waiting for the device between its steps: whether to stop is read one step late.

After each token `generate` asks whether every sequence has ended, and waits for the answer: what the host then does
for the next step (guards, masks, sampling) it does while the device has nothing to do. transformers 5.17 has a check
that is read while the next step already runs (`DeferredStopCheck`), but takes it for Apple's devices only.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import utils
from transformers.generation.utils import DeferredStopCheck

_lock, _open = threading.Lock(), 0  # how many `stopping_late` last


def _has_events(device: torch.device) -> bool:
    """Whether the host can wait for a copy without waiting for what comes after it."""
    return device.type == "cuda"


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class LateStopCheck(DeferredStopCheck):
    """transformers' late check on NVIDIA's devices, and for static caches that outlive the call.

    One step too many is run where a sequence ends by a token and not by its length; the token is taken back, and so is
    what it drew at random.
    """

    @staticmethod
    def is_supported(device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool) -> bool:
        """Whether this generation can be checked late: a cache that is kept must be able to forget its last token."""
        if is_assistant or not _has_events(device):
            return False
        return cache is None or not cache_is_returned or cache.is_croppable or _is_static(cache)

    def __init__(self, input_ids, max_length: int, cache: Cache | None, cache_is_returned: bool, streamer=None):
        self.static = cache if cache_is_returned and _is_static(cache) else None
        super().__init__(input_ids, max_length, cache, cache_is_returned and self.static is None, streamer)
        self.device = input_ids.device
        self.random_states = deque([_random_state(self.device)] * 2, maxlen=2)
        self.longest = None  # sequence whose last token has a place in the static cache
        if self.static is not None:
            self.longest = self.static.layers[0].max_cache_len + input_ids.shape[1] - int(cache.get_seq_length())

    def __call__(self, unfinished_sequences: torch.Tensor, tokens: torch.Tensor, length: int) -> bool:
        """Whether to stop by what the step before found; by this one's where one more has no place in the cache."""
        self.random_states.append(_random_state(self.device))
        stopping = super().__call__(unfinished_sequences, tokens, length)
        if not stopping and self.longest is not None and length > self.longest:
            return bool(unfinished_sequences.max() == 0)
        return stopping

    def finish(self) -> int:
        """Waits for the last step, and takes back what was one too many; returns how many steps that were."""
        steps = super().finish()
        if steps:
            state = self.random_states[0]
            torch.cuda.set_rng_state(state, self.device) if self.device.type == "cuda" else torch.set_rng_state(state)
        if self.static is not None:
            for layer in self.static.layers:
                layer.cumulative_length.sub_(steps)  # the next token is written over it
        return steps


def _is_static(cache: Cache | None) -> bool:
    """Whether all layers of a cache keep every token in its place."""
    return cache is not None and all(type(layer) is StaticLayer for layer in cache.layers)


@contextlib.contextmanager
def stopping_late() -> Iterator[None]:
    """Lets `generate`, greedy or sampling, of any model here queue a step before it knows whether the last one ended.

    The tokens are the same. Logits processors and stopping criteria see the token that is taken back. With a dynamic
    cache the host still waits once a token, where the mask is made. For the whole process while it lasts: transformers
    has no argument for it.
    """
    global _open
    with _lock:
        _open += 1
        utils.DeferredStopCheck = LateStopCheck
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                utils.DeferredStopCheck = DeferredStopCheck
