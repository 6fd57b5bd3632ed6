"""One token's products in the model: the same logits, in one graph, and the layer's own code where they do not fit."""

import pytest
import torch
from torch import nn
from transformers import CompileConfig

import kernels_hub
from modeling_motif2 import Motif2ForCausalLM
from tests.modeling_motif2.builders import random_ids, small_model


def with_products(**overrides):
    """A model with the products, and a list of the products' calls."""
    model = small_model(**({"dtype": torch.float64, "ratio": 3} | overrides))
    assert kernels_hub.use_decode_products(model) == kernels_hub.decode_products_in_use(model) != ""
    called = []
    for layer in model.model.layers:
        functions = layer.products

        def noted(*arguments, functions=functions, **options):
            called.append(functions.namespace)
            return functions.product(*arguments, **options)

        layer.products = functions._replace(product=noted)
    return model, called


@pytest.mark.parametrize("attention", ["eager", "gda_kernel"])
def test_generation_is_the_same(attention):
    model, called = with_products(rms_norm_eps=0.1)
    plain = small_model(dtype=torch.float64, ratio=3, rms_norm_eps=0.1)
    for each in (model, plain):
        each.model.layers[0].mlp.act_fn.eps = 0.2
    if attention == "gda_kernel":
        kernels_hub.use_gda_attention(model, attn_implementation=attention)
    ids = random_ids(1, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    with torch.compiler.set_stance("force_eager"):
        for kind in ("dynamic", "static"):
            called.clear()
            found = model.generate(ids, cache_implementation=kind, **options)
            wanted = plain.generate(ids, **options)
            assert len(called) == 4 * 5 * len(model.model.layers)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))
            assert torch.equal(found.sequences, wanted.sequences)


def without_guards(backend="eager") -> CompileConfig:
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None, options=options)
    config._compile_all_devices = True
    return config


def test_generate_compiles_the_step_as_one_graph():
    model = small_model(ratio=3, layers=1)
    namespace = kernels_hub.use_decode_products(model)
    kernels_hub.use_gda_attention(model, attn_implementation="gda_kernel")
    kernels_hub.use_polynorm(model, "local", training=False)
    graphs = []

    def note(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    ids = random_ids(1, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    torch._dynamo.reset()
    found = model.generate(ids, cache_implementation="static", compile_config=without_guards(note), **options)
    assert len(graphs) == 1
    assert sum(f"{namespace}.product." in target for target in graphs[0]) == 4
    wanted = small_model(ratio=3, layers=1).generate(ids, **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


def test_code_that_knows_no_model_is_dropped_for_the_next_one(monkeypatch):
    """It ran for a second model with the first one's norms: wrong by as much as the logits are large."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(Motif2ForCausalLM, "_compiled_without_guards", None)
    first, second = small_model(layers=1), small_model(layers=1)
    guarded = CompileConfig(backend="eager", mode=None)
    expected = (first, guarded, 0), (second, guarded, 0), (first, without_guards(), 0), (first, without_guards(), 0)
    expected += (second, without_guards(), 1), (first, without_guards(), 2), (second, guarded, 3), (first, guarded, 3)
    for model, config, count in expected:
        model.get_compiled_call(config)
        assert len(resets) == count


@pytest.mark.slow
def test_two_models_compiled_without_guards_run_their_own_code():
    models = [small_model(ratio=3, layers=1, **more) for more in ({}, {"rms_norm_eps": 0.5}, {"hidden_size": 64})]
    ids = random_ids(1, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    torch._dynamo.reset()
    for model in (*models, models[0]):
        found = model.generate(ids, cache_implementation="static", compile_config=without_guards(), **options)
        wanted = model.generate(ids, **options)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)


def biased(model):
    linear = model.model.layers[0].self_attn.q_proj
    linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=linear.weight.dtype))


def replaced(model):
    class Other(nn.Linear):
        pass

    model.model.layers[0].self_attn.o_proj.__class__ = Other


def transposed(model):
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data.T.contiguous().T


@pytest.mark.parametrize("change", [hooked, biased, replaced, transposed])
def test_a_projection_that_is_more_than_its_weight_runs_itself(change):
    model, called = with_products(layers=1)
    ids = random_ids(1, 1)
    with torch.no_grad():
        wanted = model(ids).logits
        assert len(called) == 4
        change(model)
        torch.testing.assert_close(model(ids).logits, wanted)
    assert len(called) == 4


def test_a_share_of_the_mlp_is_refused_by_the_layers_own_code():
    model, called = with_products(layers=1)
    model.model.layers[0].mlp.intermediate_size *= 2
    with torch.no_grad(), pytest.raises(ValueError, match="PolyNorm sees 48 of 96 features"):
        model(random_ids(1, 1))
    assert called == []


@pytest.mark.parametrize("name", ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm"])
def test_a_hook_is_called_and_another_class_runs(name):
    model, called = with_products(layers=1)
    layer, ids = model.model.layers[0], random_ids(1, 1)
    module = layer.get_submodule(name)
    zeros = module.register_forward_hook(
        lambda module, inputs, out: (out[0] * 0, out[1]) if isinstance(out, tuple) else out * 0
    )
    with torch.no_grad():
        hooked = model(ids).logits
        kernels_hub.use_decode_products(model, "torch")
        torch.testing.assert_close(model(ids).logits, hooked)
        zeros.remove()
        kernels_hub.use_decode_products(model)
        module.__class__ = type("Other", (type(module),), {"forward": lambda self, *_, **__: 1 / 0})
        with pytest.raises(ZeroDivisionError):
            model(ids)
    assert called == []


def test_under_autocast_the_layer_runs_itself():
    model, called = with_products(layers=1, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(random_ids(1, 1)).logits.dtype == torch.bfloat16
    assert called == []


def test_several_tokens_gradients_and_maps_run_the_layers_own_code():
    model, called = with_products(layers=1)
    with torch.no_grad():
        model(random_ids(1, 2))
        model(random_ids(2, 1))
        assert model(random_ids(1, 1), output_attentions=True).attentions[0] is not None
    model(random_ids(1, 1)).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert called == []


def test_sources():
    model, _ = with_products(layers=1)
    assert kernels_hub.use_decode_products(model, "torch") == kernels_hub.decode_products_in_use(model) == ""
    with pytest.raises(ValueError, match="source is 'ours'"):
        kernels_hub.use_decode_products(model, "ours")
    with pytest.raises(ValueError, match="no layers that take products"):
        kernels_hub.use_decode_products(nn.Linear(2, 2))
    model = small_model(layers=2)
    kernels_hub.use_decode_products(model)
    model.model.layers[0].products = None
    with pytest.raises(ValueError, match="different kernels as products"):
        kernels_hub.decode_products_in_use(model)
