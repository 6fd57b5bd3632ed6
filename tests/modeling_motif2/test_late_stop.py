"""Whether generation has ended is read one step late: the same tokens, and caches that go on as before."""

import warnings

import pytest
import torch
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer

import kernels_hub
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


def test_a_kept_cache_that_is_full_at_the_end(model, forwards):
    """One step more has no place in it: on a GPU that would be the end of the process."""
    ids = random_ids(1, 6)
    end = int(generated(model, ids, False, eos_token_id=None)[0, 12])
    with torch.compiler.set_stance("force_eager"):
        for room in (12, 13):
            found = []
            for late in (False, True):
                cache = StaticCache(config=model.config, max_cache_len=room)
                found.append(generated(model, ids, late, eos_token_id=end, past_key_values=cache, max_new_tokens=20))
                assert int(cache.get_seq_length()) == 12
            assert torch.equal(*found)


class Streamer(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 2])
def test_sampling_streamers_and_scores(model, forwards, rows):
    """Random numbers go on as if the step too many had not been."""
    ids, end = random_ids(rows, 6), list(range(3, 20))
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        for _ in range(4):
            streamer = Streamer() if rows == 1 else None
            options = {"do_sample": True, "eos_token_id": end, "output_scores": True, "return_dict_in_generate": True}
            out = generated(model, ids, late, streamer=streamer, **options)
            found.append((out.sequences, torch.stack(out.scores), streamer and (streamer.tokens, streamer.ended)))
    assert len({len(sequences[0]) for sequences, _, _ in found}) > 1
    for before, after in zip(found[:4], found[4:], strict=True):
        assert torch.equal(before[0], after[0])
        torch.testing.assert_close(before[1], after[1])
        assert before[2] == after[2]


def test_two_at_once_leave_nothing_behind():
    first, second = stopping_late(), stopping_late()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert utils.DeferredStopCheck is late_stop.LateStopCheck
    second.__exit__(None, None, None)
    assert utils.DeferredStopCheck is not late_stop.LateStopCheck


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
@pytest.mark.parametrize(("kind", "waits_a_token"), [("dynamic", 1), ("static", 0)])
def test_the_host_does_not_wait_for_a_gpu(kind, waits_a_token):
    """With a dynamic cache SDPA's mask asks at every step whether there is padding."""
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
    assert waits[1] - waits[0] == waits_a_token * (12 - 4)


@pytest.mark.gpu
def test_a_compiled_step_too_many_is_taken_back():
    """The guide's call: one graph, replayed as a CUDA graph, with an end token."""
    model = small_model(ratio=3, layers=2).to("cuda")
    kernels_hub.use_gda_attention(model, attn_implementation="gda_kernel")
    ids, turn = random_ids(1, 6).to("cuda"), random_ids(1, 4, seed=1).to("cuda")
    wanted = generated(model, ids, False, eos_token_id=None, max_new_tokens=20)
    end = int(wanted[0, 14])
    stop = 6 + wanted[0, 6:].tolist().index(end) + 1
    options = {"triton.cudagraphs": True, "combo_kernels": True}
    options = {"compile_config": CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)}
    torch.compiler.reset()
    for kept in (False, True):
        options |= {"cache_implementation": "static"} if not kept else {}
        for late in (True, False, True):
            more = {"past_key_values": StaticCache(config=model.config, max_cache_len=64)} if kept else {}
            found = generated(model, ids, late, eos_token_id=end, max_new_tokens=20, **options, **more)
            assert torch.equal(found, wanted[:, :stop])
            if kept:
                assert int(more["past_key_values"].get_seq_length()) == stop - 1
                both = torch.cat([found, turn], dim=1)
                after = generated(model, both, late, eos_token_id=None, **options, **more)
                assert torch.equal(after, generated(model, both, False, eos_token_id=None))
        options.pop("cache_implementation", None)
