"""Whether generation has ended is read one step late: the same tokens, and caches that go on as before."""

import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import utils

from modeling_motif2 import late_stop, stopping_late
from tests.modeling_motif2.builders import random_ids, small_config, small_model


class Event:
    """Of a device that has always done what it was asked."""

    def __init__(self, **options):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture(scope="module")
def model():
    return small_model(attention="sdpa", dtype=torch.float64, ratio=3)


@pytest.fixture
def forwards(model, monkeypatch):
    """Counts the model's forwards; the CPU passes for a device with events."""
    monkeypatch.setattr(late_stop, "_has_events", lambda device: True)
    monkeypatch.setattr(torch, "Event", Event)
    called = []
    handle = model.register_forward_pre_hook(lambda *_: called.append(1))
    yield called
    handle.remove()


def generated(model, ids, late: bool, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    if not late:
        return model.generate(ids, **options)
    with stopping_late():
        return model.generate(ids, **options)


def caches(model):
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_same_tokens_and_one_step_more(model, forwards, kind):
    ids = random_ids(2, 6)
    whole = generated(model, ids, False, eos_token_id=None, cache_implementation=kind)
    ends = whole[:, 9].tolist()  # the fourth token of either row ends it
    for eos, more in ((None, 0), (ends, 1)):
        counts, found = [], []
        for late in (False, True):
            forwards.clear()
            with torch.compiler.set_stance("force_eager"):
                found.append(generated(model, ids, late, eos_token_id=eos, cache_implementation=kind))
            counts.append(len(forwards))
        assert torch.equal(*found)
        assert counts[1] == counts[0] + more
    assert utils.DeferredStopCheck is not late_stop.LateStopCheck


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_kept_goes_on(model, forwards, kind):
    ids, turn = random_ids(1, 6), random_ids(1, 4, seed=1)
    end = int(generated(model, ids, False, eos_token_id=None)[0, 8])
    found = []
    with torch.compiler.set_stance("force_eager"):
        for late in (False, True):
            cache = caches(model)[kind]()
            first = generated(model, ids, late, eos_token_id=end, past_key_values=cache)
            assert int(cache.get_seq_length()) == first.shape[1] - 1
            both = torch.cat([first, turn], dim=1)
            found.append(generated(model, both, late, eos_token_id=None, past_key_values=cache))
    assert torch.equal(*found)
    assert torch.equal(found[0], generated(model, both, False, eos_token_id=None))


def test_where_it_is_not_taken():
    kept = StaticCache(config=small_config(sliding_window=4, use_sliding_window=True), max_cache_len=8)
    supported = late_stop.LateStopCheck.is_supported
    assert not supported(torch.device("cpu"), None, False, is_assistant=False)
    gpu = torch.device("cuda")
    assert supported(gpu, None, False, is_assistant=False)
    assert not supported(gpu, None, False, is_assistant=True)
    assert supported(gpu, kept, False, is_assistant=False)
    assert not supported(gpu, kept, True, is_assistant=False)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_host_does_not_wait_for_a_gpu(kind):
    model = small_model(attention="sdpa").to("cuda")
    ids = random_ids(2, 6).to("cuda")
    options = {"cache_implementation": kind, "disable_compile": True}
    end = int(generated(model, ids, False, eos_token_id=None, **options)[0, 9])
    for eos in (None, end):
        plain, late = (generated(model, ids, late, eos_token_id=eos, **options) for late in (False, True))
        assert torch.equal(plain, late)
    waits = []
    for tokens in (4, 12):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                generated(model, ids, True, eos_token_id=None, max_new_tokens=tokens, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(each.message) for each in told))
    assert waits[0] == waits[1]
