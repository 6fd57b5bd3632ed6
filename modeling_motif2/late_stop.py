"""`generate` without waiting for the device between its steps: whether to stop is read one step late.

After each token `generate` asks whether every sequence has ended, and waits for the answer: what the host then does
for the next step (guards, masks, sampling) it does while the device has nothing to do. transformers 5.17 has a check
that is read while the next step already runs (`DeferredStopCheck`), but takes it for Apple's devices only.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import utils
from transformers.generation.utils import DeferredStopCheck


def _has_events(device: torch.device) -> bool:
    """Whether the host can wait for a copy without waiting for what comes after it."""
    return device.type == "cuda"


class LateStopCheck(DeferredStopCheck):
    """transformers' late check on NVIDIA's devices, and for static caches that outlive the call.

    One step too many is run where a sequence ends by a token and not by its length; the token is taken back.
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

    def finish(self) -> int:
        """Waits for the last step, and takes back what was one too many; returns how many steps that were."""
        steps = super().finish()
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

    The tokens are the same. For the whole process while it lasts: transformers has no argument for it.
    """
    before = utils.DeferredStopCheck
    utils.DeferredStopCheck = LateStopCheck
    try:
        yield
    finally:
        utils.DeferredStopCheck = before
