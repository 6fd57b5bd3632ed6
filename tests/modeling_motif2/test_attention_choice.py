"""Attention by measurement: what is measured, kept and refused, and the ways that can be chosen."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend

from modeling_motif2 import (
    attention,
    attention_choice,
    attention_measurement,
    attention_ways,
    visible_intervals,
)
from modeling_motif2.attention_measurement import Situation
from modeling_motif2.attention_ways import FLASH, FLASH_BACKWARD, KERNEL, SDPA, WAYS, Way, possible_ways
from modeling_motif2.diagnostics import attention_modules
from tests.modeling_motif2 import flash_kernel
from tests.modeling_motif2.builders import random_ids, small_model, with_kernel
from trainer.execution import recompute_layers


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("_choices", "_latest"):
        monkeypatch.setattr(attention_measurement, name, {})
    monkeypatch.setattr(attention_measurement, "_read_from", set())


def measuring(monkeypatch, milliseconds, ways=("sdpa", "kernel")):
    """Lets a CPU measure, with times by way's name instead of a clock; returns the model, its layer and the calls."""
    model = with_kernel("gda_fastest")
    layer = attention_modules(model)[0]
    measured = []

    def timed(function, device):
        function()
        measured.append(names.pop(0))
        return milliseconds[measured[-1]]

    names = list(ways)
    monkeypatch.setattr(attention_measurement, "_milliseconds", timed)
    return layer, measured, names


def measure(layer, training=False, tokens=6):
    query = torch.randn(1, 6, tokens, 8, dtype=torch.float64)
    key = torch.randn(1, 2, 2, tokens, 8, dtype=torch.float64)
    situation = attention_measurement.situation_of(query, key, "causal", training)
    return attention_measurement.measured_choice(layer, situation, [SDPA, KERNEL], query, key, None, {})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("winner", ["sdpa", "kernel"])
def test_the_fastest_way_is_chosen_and_kept(monkeypatch, winner, training):
    layer, measured, _ = measuring(monkeypatch, {"sdpa": 2.0, "kernel": 2.0} | {winner: 1.0})
    assert measure(layer, training).name == winner
    assert measured == ["sdpa", "kernel"]
    assert measure(layer, training, tokens=5).name == winner  # 5 and 6 tokens are one size
    assert attention_measurement.latest_way("causal", training, False).name == winner
    assert attention_measurement.latest_way("causal", training, True) is None  # a step of one token is not a prompt
    kept = json.loads(attention_measurement.cache_path().read_text())
    assert [entry["name"] for entry in kept.values()] == [winner]
    attention_measurement._choices.clear()  # another process reads the file
    attention_measurement._read_from.clear()
    assert measure(layer, training).name == winner
    assert len(measured) == 2
    ((situation, choice),) = attention_measurement.choices().items()
    assert ("training" if training else "inference") in situation
    assert choice.milliseconds[winner] == 1.0
    attention_measurement.forget_choices()
    assert attention_measurement.choices() == {}


def with_flash(layer, refused=()):
    """Makes the layer's kernel offer FlashAttention-4's passes; returns which passes its calls asked for."""
    functions, asked = layer.kernel, []

    def attend(*arguments, forward="own", backward="own", **options):
        if (forward, backward) in refused:
            raise ImportError("no module named cutlass")
        asked.append((forward, backward))
        out, largest = functions.attend(*arguments, **options)
        return out, largest if forward == "own" else None

    layer.kernel = functions._replace(attend=attend, supports_flash=lambda *_: True)
    return asked


def states(tokens=6, wanted=True):
    query = torch.randn(1, 6, tokens, 8, dtype=torch.float64, requires_grad=wanted)
    return query, torch.randn(1, 2, 2, tokens, 8, dtype=torch.float64)


def chosen(layer, training=True):
    query, key = states(wanted=training)
    possible = possible_ways(layer, query, key, None, "causal")
    situation = attention_measurement.situation_of(query, key, "causal", training)
    return attention_measurement.measured_choice(layer, situation, possible, query, key, None, {})


@pytest.mark.parametrize("faster", ["kernel", "kernel, flash backward", "kernel, flash"])
def test_the_kernel_takes_the_passes_that_are_faster(monkeypatch, faster):
    ways = ["sdpa", "kernel", "kernel, flash backward", "kernel, flash"]
    layer, measured, _ = measuring(monkeypatch, dict.fromkeys(ways, 2.0) | {faster: 1.0}, ways)
    asked = with_flash(layer)
    choice = chosen(layer)
    assert (choice.name, measured) == (faster, ways)
    assert set(asked) == {("own", "own"), ("own", "flash"), ("flash", "flash")}
    asked.clear()
    leaves = [torch.randn(1, heads, 6, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2)]
    key = torch.randn(1, 2, 2, 6, 8, dtype=torch.float64)
    way = WAYS[choice.name]
    out, _ = layer.attend(way, *leaves, key, key, None)
    assert asked == [(way.forward, way.backward)]
    assert all(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_inference_measures_the_forward_only(monkeypatch):
    ways = ["sdpa", "kernel", "kernel, flash"]
    layer, measured, _ = measuring(monkeypatch, dict.fromkeys(ways, 2.0) | {"kernel, flash": 1.0}, ways)
    with_flash(layer)
    assert chosen(layer, training=False).name == "kernel, flash"
    assert measured == ways


def test_where_flash_is_no_candidate():
    layer = attention_modules(with_kernel("gda_fastest"))[0]
    query, key = states()

    def flash_ways(*arguments):
        return [way for way in possible_ways(layer, *arguments) if way in (FLASH_BACKWARD, FLASH)]

    assert flash_ways(query, key, None, "causal") == []  # the package is not here
    with_flash(layer)
    assert flash_ways(query, key, None, "causal") == [FLASH_BACKWARD, FLASH]
    intervals = torch.stack((torch.zeros(1, 6), torch.arange(6)[None])).int()
    assert flash_ways(query, key, intervals, "masked") == []
    assert flash_ways(query, key[:, :, :, :5], None, "causal") == []
    assert flash_ways(*states(wanted=False), None, "causal") == [FLASH]
    layer.max_logits = torch.zeros(8)
    assert flash_ways(query, key, None, "causal") == [FLASH_BACKWARD]
    torch.use_deterministic_algorithms(True)
    try:
        assert flash_ways(query, key, None, "causal") == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_passes_that_fail_leave_the_kernel(monkeypatch):
    layer, _, _ = measuring(monkeypatch, {"sdpa": 2.0, "kernel": 1.0}, ("sdpa", "kernel"))
    with_flash(layer, refused=(("own", "flash"), ("flash", "flash")))
    choice = chosen(layer)
    assert choice.name == "kernel"
    refusal = "ImportError: no module named cutlass"
    assert choice.refused == {"kernel, flash backward": refusal, "kernel, flash": refusal}


@pytest.mark.parametrize("winner", ["sdpa", "kernel"])
@pytest.mark.parametrize("kept", ["full", "selective"])
def test_measuring_inside_a_checkpointed_layer(monkeypatch, kept, winner):
    """Selective recomputation keeps results in the order of the calls: the trial's must not be among them."""
    layers = 2
    model, plain = with_kernel("gda_fastest", layers=layers), small_model(dtype=torch.float64, ratio=3, layers=layers)
    model.train()
    recompute_layers(model, kept)
    ids, names = random_ids(2, 9), []
    plain(ids, labels=ids, use_cache=False).loss.backward()

    def timed(function, device):
        function()
        names.append(("sdpa", "kernel")[len(names) % 2])
        return 1.0 if names[-1] == winner else 2.0

    def choose(attention, query, key, mask, kwargs):
        training = attention_ways.is_training(query, key)
        situation = attention_measurement.situation_of(query, key, "causal", training)
        choice = attention_measurement.measured_choice(attention, situation, [SDPA, KERNEL], query, key, mask, kwargs)
        assert choice.name == winner
        return WAYS[choice.name]

    monkeypatch.setattr(attention, "choose", choose)
    monkeypatch.setattr(attention_measurement, "_milliseconds", timed)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert names == ["sdpa", "kernel"]
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_padding_does_not_speak_against_the_kernel(monkeypatch, training):
    ways = ["sdpa", "kernel"]
    layer, measured, _ = measuring(monkeypatch, {"sdpa": 2.0, "kernel": 1.0}, ways)
    query, key = states(wanted=training)
    last = torch.arange(6)[None]
    mask = torch.stack((torch.full((1, 6), 2), last)).int()  # the first two tokens are padding
    situation = attention_measurement.situation_of(query, key, "masked", training)
    choice = attention_measurement.measured_choice(layer, situation, [SDPA, KERNEL], query, key, mask, {})
    assert (choice.name, choice.refused, measured) == ("kernel", {}, ways)


def test_sdpa_may_fail(monkeypatch):
    layer, _, _ = measuring(monkeypatch, {"kernel": 1.0}, ("kernel",))
    attend = layer.attend

    def without_sdpa(way, *arguments, **kwargs):
        if way is SDPA:
            raise torch.OutOfMemoryError("out of memory")
        return attend(way, *arguments, **kwargs)

    layer.attend = without_sdpa
    choice = measure(layer)
    assert (choice.name, choice.refused) == ("kernel", {"sdpa": "OutOfMemoryError: out of memory"})


def test_nothing_runs(monkeypatch, capsys):
    layer, _, _ = measuring(monkeypatch, {}, ())

    def fails(*_, **__):
        raise RuntimeError("no")

    layer.attend = fails
    choice = measure(layer)
    assert (choice.name, choice.milliseconds) == ("sdpa", {})
    assert "SDPA runs" in capsys.readouterr().err
    assert json.loads(attention_measurement.cache_path().read_text()) == {}


@pytest.mark.parametrize("content", ['{"a": ', "[]", '{"a": 1}', '{"a": {"name": "kernel", "seconds": {}}}'])
def test_a_spoilt_file_is_no_file(monkeypatch, content):
    attention_measurement.cache_path().parent.mkdir(parents=True)
    attention_measurement.cache_path().write_text(content)
    assert attention_measurement.choices() == {}
    layer, _, _ = measuring(monkeypatch, {"sdpa": 2.0, "kernel": 1.0})
    assert measure(layer).name == "kernel"
    assert [entry["name"] for entry in json.loads(attention_measurement.cache_path().read_text()).values()] == [
        "kernel"
    ]


def test_libraries_of_other_versions_are_measured_anew(monkeypatch):
    situation = Situation("H100", torch.bfloat16, (8, 4, 128), 2, 4096, 4096, "causal", True)
    names = set()
    for version in ("1", "2"):
        attention_measurement._libraries.cache_clear()
        monkeypatch.setattr(attention_measurement.metadata, "version", lambda name, version=version: version)
        names.add(situation.key([SDPA, KERNEL], ""))
    attention_measurement._libraries.cache_clear()
    assert len(names) == 2


def test_keys_alone_may_want_gradients():
    layer = attention_modules(with_kernel("gda_fastest"))[0]
    with_flash(layer)
    query, key = states(wanted=False)
    assert FLASH_BACKWARD in possible_ways(layer, query, key.requires_grad_(), None, "causal")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_rank_with_some_of_the_groups_trains_without_the_kernel(wanted):
    """Its norm's gradient is summed over the ranks by a hook on the norm, which the kernel does not call."""
    layer = attention_modules(with_kernel("gda_fastest"))[0]
    query, key = states(wanted=wanted)
    assert KERNEL in possible_ways(layer, query, key, None, "causal")
    assert (KERNEL in possible_ways(layer, query[:, :3], key[:, :1], None, "causal")) is not wanted


def test_a_way_that_fails_or_disagrees_is_refused(monkeypatch):
    layer, _, _ = measuring(monkeypatch, {"sdpa": 2.0, "kernel": 1.0}, ways=("sdpa",))
    functions = layer.kernel
    layer.kernel = functions._replace(attend=lambda *a, **k: (2 * functions.attend(*a, **k)[0], None))
    choice = measure(layer)
    assert choice.name == "sdpa"
    assert choice.refused["kernel"].startswith("ValueError: differs from the first way by 1.0e+00")


def test_a_way_that_raises_is_refused(monkeypatch):
    layer, _, _ = measuring(monkeypatch, {"sdpa": 2.0}, ways=("sdpa",))

    def fails(*_, **__):
        raise RuntimeError("out of shared memory\nmore")

    layer.kernel = layer.kernel._replace(attend=fails)
    assert measure(layer).refused == {"kernel": "RuntimeError: out of shared memory"}


def test_measuring_leaves_diagnostics_alone(monkeypatch):
    """Maxima are part of what is timed, so a choice without them is another one."""
    layer, _, _ = measuring(monkeypatch, {"sdpa": 2.0, "kernel": 1.0})
    layer.max_logits = before = torch.full((8,), -torch.inf)
    tracked, raised = [], attention.raise_max_logits

    def noted(layer, largest):
        raised(layer, largest)
        tracked.append(bool(layer.max_logits.isfinite().all()))

    monkeypatch.setattr(attention, "raise_max_logits", noted)
    measure(layer)
    assert layer.max_logits is before
    assert (before == -torch.inf).all()
    assert tracked
    assert all(tracked)
    keys = {Situation("H100", torch.bfloat16, (8, 4, 128), 2, 8, 8, "causal", True, each) for each in (False, True)}
    assert len({situation.key([SDPA], "") for situation in keys}) == 2


def test_a_situation_names_what_matters():
    situation = Situation("H100", torch.bfloat16, (8, 4, 128), 2, 4096, 4096, "causal", True)
    name = situation.key([SDPA, KERNEL], "_gda_1")
    for part in ("H100", torch.__version__, "_gda_1", "bfloat16", "T4096", "causal", "training", "sdpa, kernel"):
        assert part in name


@pytest.mark.parametrize(
    ("latest", "possible", "taken"),
    [
        (SDPA, [SDPA, KERNEL], SDPA),
        (FLASH, [SDPA, KERNEL], KERNEL),
        (FLASH, [SDPA], SDPA),
        (None, [SDPA, KERNEL], KERNEL),
    ],
    ids=str,
)
def test_compiled_code_takes_the_latest_way_if_that_can_run_here(monkeypatch, latest, possible, taken):
    layer = attention_modules(with_kernel("gda_fastest"))[0]
    states = SimpleNamespace(device=torch.device("cuda"), shape=(1, 6, 6, 8), requires_grad=False)
    monkeypatch.setattr(attention_choice, "is_recorded", lambda _: True)
    monkeypatch.setattr(attention_choice, "possible_ways", lambda *_: [*possible, FLASH_BACKWARD])
    if latest is not None:
        attention_measurement._latest["causal", False, False] = latest.name
    assert attention_choice.choose(layer, states, states, None, {}) is taken


@pytest.mark.slow
def test_a_way_that_holds_sdpa_to_a_kernel_compiles():
    layer = attention_modules(small_model(dtype=torch.float64, ratio=3))[0]
    way = Way("math", "sdpa", wide=True, sdpa=SDPBackend.MATH)
    inputs = [torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (6, 2)]
    inputs += [torch.randn(2, 2, 2, 7, 8, dtype=torch.float64) for _ in range(2)]
    intervals = torch.stack((torch.zeros(2, 7), torch.arange(7).expand(2, -1))).int()
    want, _ = layer.attend(None, *inputs, torch.ones(7, 7, dtype=torch.bool).tril().log()[None, None])
    compiled = torch.compile(lambda *states: layer.attend(way, *states)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, intervals), want)
    torch.testing.assert_close(compiled(*inputs, None), want)


@pytest.mark.parametrize("name", attention_choice.CHOOSERS)
def test_transformers_takes_the_names(name, tmp_path):
    model = small_model(dtype=torch.float32)
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
    ids = random_ids(1, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert all((tmp_path / f"attention_{part}.py").exists() for part in ("choice", "measurement", "ways"))


def documents_and_padding():
    """Intervals of rows of 11 tokens: documents of 4, 1 and 6; one after three of padding; 7 tokens, then padding."""
    index = torch.arange(11).expand(3, -1)
    first = torch.tensor([[0] * 4 + [4] + [5] * 6, [3] * 11, [0] * 11])
    padding = torch.zeros(3, 11, dtype=torch.bool)
    padding[1, :3] = padding[2, 7:] = True
    return torch.stack((torch.where(padding, index + 1, first), index)).int(), padding


def test_intervals_are_told_as_lengths():
    intervals, _ = documents_and_padding()
    found = visible_intervals.lengths_of_documents(intervals)
    assert found["cu_seq_lens_q"].tolist() == [0, 4, 5, 11, 14, 22, 29, 33]
    assert found["max_length_q"] == 8
    assert visible_intervals.lengths_of_documents(intervals) is found
    del intervals
    assert len(visible_intervals._lengths) == 0


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_packages_take_documents_and_padding(monkeypatch, name):
    flash_kernel.install(monkeypatch)
    layer = attention_modules(with_kernel("gda_fastest"))[0]
    inputs = [torch.randn(3, heads, 11, 8, dtype=torch.float64) for heads in (6, 2)]
    inputs += [torch.randn(3, 2, 2, 11, 8, dtype=torch.float64) for _ in range(2)]
    intervals, padding = documents_and_padding()
    want, _ = layer.attend(SDPA, *inputs, intervals)
    with torch.compiler.set_stance("force_eager"):  # FlexAttention
        found, _ = layer.attend(WAYS[name], *inputs, intervals)
    torch.testing.assert_close(found[~padding], want[~padding])


def test_which_packages_take_intervals(monkeypatch):
    layer = attention_modules(small_model(dtype=torch.float64, ratio=3))[0]
    monkeypatch.setattr(attention_ways, "is_flash_attn_4_available", lambda: True)
    intervals, _ = documents_and_padding()
    query, key = torch.empty(3, 6, 11, 8), torch.empty(3, 2, 2, 11, 8)

    def packages(keys=key, mask=intervals):
        return [way.name for way in attention_ways._ways_of_packages(layer, query, keys, mask)]

    assert packages() == packages(mask=None) == ["flash_attention_4"]
    assert packages(mask=torch.ones(3, 1, 11, 11, dtype=torch.bool)) == []
    assert packages(keys=torch.empty(3, 2, 2, 20, 8)) == []  # a cache with room
    monkeypatch.setattr(attention_ways, "is_recorded", lambda _: True)
    assert (packages(), packages(mask=None)) == ([], ["flash_attention_4"])
    monkeypatch.setattr(attention_ways, "is_recorded", lambda _: False)
    monkeypatch.setattr(layer.config, "layer_types", ["sliding_attention"] * 8)
    assert packages() == []


def test_layers_compiled_with_documents_share_the_choice_of_packages():
    intervals, _ = documents_and_padding()
    query, key = torch.empty(3, 6, 11, 8), torch.empty(3, 2, 2, 11, 8)
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def ways(layer, query):
        return query + len(attention_ways._ways_of_packages(layer, query, key, intervals))

    for layer in attention_modules(small_model(layers=4, ratio=3)):
        ways(layer, query)
    assert counter.frame_count == 1


def test_memory_that_runs_out_for_the_trial_costs_the_measurement_only(monkeypatch, capsys):
    layer, _, _ = measuring(monkeypatch, {}, ())

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_measurement, "_trial", fails)
    choice = measure(layer)
    assert (choice.name, list(choice.refused)) == ("sdpa", ["sdpa", "kernel"])
    assert "SDPA runs" in capsys.readouterr().err
