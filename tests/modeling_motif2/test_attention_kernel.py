"""The attention kernel in the model: intervals, caches, gradients, maxima, compiled code, and where it cannot run."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

import kernels_hub
from modeling_motif2 import modeling_motif2
from modeling_motif2.diagnostics import attention_modules, record_attention, track_max_logits
from tests.modeling_motif2.builders import outputs_of_documents, random_ids, small_model, with_kernel
from tests.modeling_motif2.reference import reference_logits

EPS = {"attn_rms_norm_eps": 0.1}  # large enough to be seen
FLOAT64_TOLERANCE = 2e-6  # RoPE's angles are float32


def kernel_calls(model):
    """Makes the layers' kernel note its calls, and returns the list."""
    called = []
    for layer in attention_modules(model):
        functions = layer.kernel

        def noted(name, functions=functions):
            def call(*arguments, **options):
                called.append(name)
                return getattr(functions, name)(*arguments, **options)

            return call

        layer.kernel = functions._replace(attend=noted("attend"), decode=noted("decode"))
    return called


def relative_error(actual, expected):
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["gda_kernel", "gda_fastest"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("layout", ["left", "right", "packed", "cu_seq_lens"])
def test_masks_are_right(layout, window, name):
    overrides = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model = with_kernel(name, **overrides)
    called = kernel_calls(model)
    documents = [random_ids(1, length, seed=length)[0] for length in (5, 11, 1, 7)]
    for output, document in zip(outputs_of_documents(model, layout, documents), documents, strict=True):
        assert relative_error(output, reference_logits(model, document)) < FLOAT64_TOLERANCE
    assert called == (["attend"] * 2 if name == "gda_kernel" else [])


@pytest.mark.parametrize("name", ["gda_kernel", "gda_fastest"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_of_every_kind_continue_rightly(kind, window, name):
    overrides = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model = with_kernel(name, **overrides)
    called = kernel_calls(model)
    ids = random_ids(2, 15)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    parts, start = [], 0
    with torch.no_grad():
        for step in (6, 1, 1, 4, 1, 2):
            parts.append(model(ids[:, start : start + step], past_key_values=cache, use_cache=True).logits)
            start += step
    logits = torch.cat(parts, dim=1)
    for index, row in enumerate(ids):
        assert relative_error(logits[index], reference_logits(model, row)) < FLOAT64_TOLERANCE
    if name == "gda_kernel":
        assert [called.count(each) for each in ("attend", "decode")] == [6, 6]


def test_gradients_through_the_kernel():
    model, plain = with_kernel(**EPS), small_model(dtype=torch.float64, ratio=3, **EPS)
    called = kernel_calls(model)
    ids = random_ids(2, 9)
    found, wanted = (
        torch.autograd.grad(each(ids, labels=ids).loss, list(each.parameters())) for each in (model, plain)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert called == ["attend"] * 2


@pytest.mark.parametrize("name", ["gda_kernel", "gda_fastest"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_maximum_logits_and_norms_need_no_square_masks(monkeypatch, side, name):
    model, plain = with_kernel(name), small_model(dtype=torch.float64, ratio=3)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[:, slice(0, 5) if side == "left" else slice(7, None)] = 0
    found = []
    for each in (plain, model):
        with monkeypatch.context() as patch:
            if each is model:
                patch.setattr(modeling_motif2, "visible_positions", refuse_positions)
            with torch.no_grad(), record_attention(each) as statistics:
                each(ids, attention_mask=mask)
            track_max_logits(each)
            each(ids, attention_mask=mask)
        logits = torch.stack([layer.max_logits for layer in attention_modules(each)])
        found.append((logits, torch.tensor([layer.noise_share for layer in statistics])))
    assert torch.isfinite(found[0][0]).all()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def refuse_positions(*_):
    raise AssertionError("masks of queries by keys were made")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_kernel_gives_the_maximum_logits(side):
    model = with_kernel()
    called = kernel_calls(model)
    plain = small_model(dtype=torch.float64, ratio=3)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 5) if side == "left" else slice(7, None)] = 0
    for each in (model, plain):
        track_max_logits(each)
        with torch.no_grad():
            each(ids, attention_mask=mask)
            each(ids[:, :1])
    for mine, theirs in zip(attention_modules(model), attention_modules(plain), strict=True):
        torch.testing.assert_close(mine.max_logits, theirs.max_logits)
    assert called == ["attend"] * 2 + ["decode"] * 2


def test_what_the_kernel_cannot_do_runs_without_it():
    model = with_kernel()
    called = kernel_calls(model)
    ids = random_ids(2, 9)
    holes = torch.ones_like(ids)
    holes[0, 3] = 0
    plain = small_model(attention="sdpa", dtype=torch.float64, ratio=3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, attention_mask=holes).logits, plain(ids, attention_mask=holes).logits)
        square = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        torch.testing.assert_close(model(ids, attention_mask=square).logits, plain(ids, attention_mask=square).logits)
        with record_attention(model) as statistics:
            model(ids)
    assert statistics[0].noise_share > 0
    assert called == []


def test_generation_is_the_same():
    model, plain = with_kernel(**EPS), small_model(dtype=torch.float64, ratio=3, **EPS)
    ids = random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    with torch.compiler.set_stance("force_eager"):
        static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, plain.generate(ids, **options))


def test_the_model_is_one_graph_with_the_kernel():
    model, graphs = with_kernel(dtype=torch.float32, layers=1), []

    def note(graph, inputs):
        graphs.append(sum("gda_attention" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    ids = random_ids(2, 9)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model.forward, fullgraph=True, backend=note)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)
    assert graphs == [1]


def compile_layers_of(model, backend):
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)


def test_decoding_layers_compiled_one_by_one_hold_their_own_factor():
    """A number that the compiler had made a symbol of was another layer's in Inductor's code."""
    model, factors = with_kernel(dtype=torch.float32, layers=3), []

    def note(graph, inputs):
        factors.extend(node.args[-1] for node in graph.graph.nodes if "gda_decode" in str(node.target))
        return graph.forward

    compile_layers_of(model, note)
    with torch.no_grad():
        model(random_ids(2, 1), use_cache=False)
    assert factors == [1 - layer.lambda_init for layer in attention_modules(model)]


@pytest.mark.slow
def test_decoding_layers_compiled_one_by_one_give_the_same_logits():
    model, plain = (with_kernel(dtype=torch.float32, layers=4) for _ in range(2))
    compile_layers_of(model, "inductor")
    ids = random_ids(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
@pytest.mark.parametrize("name", ["gda_kernel", "gda_fastest"])
def test_gradients_of_compiled_code(name, whole):
    model = with_kernel(name, dtype=torch.float32, layers=1)
    ids = random_ids(2, 9)
    want = model(ids, use_cache=False).logits
    wanted = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    part = model if whole else model.model.layers[0]
    part.forward = torch.compile(part.forward, fullgraph=True, backend="aot_eager")
    got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), list(model.parameters())), wanted)


def test_the_kernel_can_be_taken_out_and_the_model_copied():
    model = with_kernel()
    namespace = kernels_hub.gda_attention_in_use(model)
    assert namespace.startswith("_gda_attention_cpu_")
    twin = copy.deepcopy(model)
    assert kernels_hub.gda_attention_in_use(twin) == namespace
    kernels_hub.use_gda_attention(twin, "torch")
    assert kernels_hub.gda_attention_in_use(twin) == ""
    assert twin.config._attn_implementation == "sdpa"
    attention_modules(model)[0].kernel = None
    with pytest.raises(ValueError, match="different kernels"):
        kernels_hub.gda_attention_in_use(model)
    with pytest.raises(ValueError, match="source is 'best'"):
        kernels_hub.use_gda_attention(model, "best")
    with pytest.raises(ValueError, match="attn_implementation is 'best'"):
        kernels_hub.use_gda_attention(model, attn_implementation="best")
    with pytest.raises(ValueError, match="no grouped differential attention"):
        kernels_hub.use_gda_attention(torch.nn.Linear(2, 2))


def test_a_kernel_that_was_asked_for_and_cannot_be_had_is_an_error(monkeypatch):
    def missing(*_):
        raise kernels_hub.KernelUnavailable("no variant")

    monkeypatch.setattr(kernels_hub.functions, "load_local", missing)
    monkeypatch.setattr(kernels_hub.functions, "load_remote", missing)
    model = small_model(dtype=torch.float64)
    with pytest.raises(kernels_hub.KernelUnavailable, match="no variant"):
        kernels_hub.use_gda_attention(model, "local")
    assert kernels_hub.use_gda_attention(model) == ""
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert relative_error(model(ids).logits[0], reference_logits(model, ids[0])) < FLOAT64_TOLERANCE


def given_to_the_kernel(model) -> list[tuple]:
    """What a model's first layer hands to its kernel: keys, values, and the intervals' first keys."""
    layer, given = attention_modules(model)[0], []
    functions = layer.kernel

    def attend(*arguments, **options):
        given.append((*arguments[2:4], options.get("first")))
        return functions.attend(*arguments, **options)

    layer.kernel = functions._replace(attend=attend)
    return given


@pytest.mark.parametrize("cache", [None, DynamicCache, StaticCache])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_prompt_reaches_the_kernel_as_projections_leave_it(cache, padding):
    """As many keys as queries, tokens before heads, as kernels for Hopper take them, at a cache's second use too."""
    model = with_kernel()
    given = given_to_the_kernel(model)
    options = {"max_cache_len": 20} if cache is StaticCache else {}
    past = None if cache is None else cache(config=model.config, **options)
    ids = torch.cat([torch.zeros(2, padding, dtype=torch.long), random_ids(2, 9)], dim=1)
    mask = (torch.arange(9 + padding) >= padding).long().repeat(2, 1)
    mask[1] = 1
    for _ in range(1 if cache is DynamicCache else 2):
        if cache is StaticCache:
            past.reset()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        arguments = {"attention_mask": mask, "position_ids": positions} if padding else {}
        with torch.no_grad():
            found = model(ids, past_key_values=past, use_cache=cache is not None, **arguments).logits
        assert relative_error(found[0, padding:], reference_logits(model, ids[0, padding:])) < FLOAT64_TOLERANCE
        assert relative_error(found[1], reference_logits(model, ids[1])) < FLOAT64_TOLERANCE
        key, value, first = given.pop()
        assert key.shape[1] == value.shape[1] == ids.shape[1]
        assert key.stride(1) > key.stride(2)
        assert value.stride(1) > value.stride(2)
        assert (first is None) == (padding == 0)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_prompt_after_another_sees_the_whole_static_cache(padding):
    model = with_kernel()
    given = given_to_the_kernel(model)
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), random_ids(1, 12)], dim=1)
    mask = (torch.arange(padding + 12) >= padding).long()[None] if padding else None
    cache, logits = StaticCache(config=model.config, max_cache_len=20), []
    with torch.no_grad():
        for start, end in ((0, padding + 7), (padding + 7, padding + 12)):
            arguments = {} if mask is None else {"attention_mask": mask[:, :end]}
            arguments["position_ids"] = (torch.arange(start, end) - padding).clamp(min=0)[None]
            logits.append(model(ids[:, start:end], past_key_values=cache, **arguments).logits[0])
    assert [each[0].shape[1] for each in given] == [padding + 7, 20]
    wanted = reference_logits(model, ids[0, padding:])
    assert relative_error(torch.cat(logits)[padding:], wanted) < FLOAT64_TOLERANCE
