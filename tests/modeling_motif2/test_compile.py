"""No graph breaks: the decoder layer and the whole model compile as one graph."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers.cache_utils import StaticCache

from modeling_motif2.diagnostics import attention_modules, track_max_logits
from tests.modeling_motif2.builders import random_ids, small_model


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "tracked"), [("eager", False), ("sdpa", True)])
def test_the_decoder_layer_is_one_graph(backend, tracked):
    model = small_model(attention=backend, ratio=3, layers=1)
    track_max_logits(model, tracked)
    ids = random_ids(2, 9)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.model.layers.parameters()))
    largest = [None if module.max_logits is None else module.max_logits.clone() for module in attention_modules(model)]
    track_max_logits(model, False)
    track_max_logits(model, tracked)
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(model(ids, labels=ids).loss, list(model.model.layers.parameters()))
    for mine, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
    for module, value in zip(attention_modules(model), largest, strict=True):
        if value is not None:
            torch.testing.assert_close(module.max_logits, value)


def test_the_whole_model_is_one_graph_and_decodes_with_a_static_cache():
    model = small_model(attention="sdpa", ratio=3)
    ids = random_ids(1, 8)
    cache = StaticCache(model.config, max_cache_len=12)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :6], past_key_values=cache, use_cache=True)
        for index in (6, 7):
            position = torch.tensor([[index]])
            step = compiled(ids[:, index : index + 1], past_key_values=cache, use_cache=True, position_ids=position)
            torch.testing.assert_close(step.logits[:, 0], expected[:, index])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "gda_kernel"])
def test_packed_documents_stay_apart_in_one_graph(backend):
    model = small_model(attention=backend, ratio=3, layers=1)
    ids, positions = random_ids(1, 9), torch.cat([torch.arange(4), torch.arange(5)])[None]
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
        for given in (
            {"position_ids": positions},
            {"position_ids": positions, "attention_mask": torch.ones(1, 9)},
            {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)},
        ):
            torch.testing.assert_close(compiled(ids, use_cache=False, **given).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_compiled_code_gives_the_same_logits(backend):
    model = small_model(attention=backend, ratio=3, head_dim=16)
    reference = small_model(attention="eager", ratio=3, head_dim=16)
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = reference(ids).logits
        # Inductor cannot compile FlexAttention on CPU together with what makes its query; alone it can.
        for layer in model.model.layers if backend == "sdpa" else []:
            layer.forward = torch.compile(layer.forward, fullgraph=True)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_compiled_sdpa_lies_as_its_output_does():
    model = small_model(attention="sdpa", ratio=3, layers=1)
    gradients = []

    def note(graph, inputs):
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target) and "backward" in str(node.target):
                gradients.append((node.args[0].meta["val"], str(node.args[0].args[0].target)))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=note)
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, fullgraph=True, backend=backend)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    assert gradients
    for gradient, source in gradients:
        assert "tokens_first" in source
        assert gradient.transpose(1, 2).is_contiguous()  # (B, H, T, D)
    gradient = torch.randn(2, 3, 4, 5).transpose(1, 2)  # (B, T, H, D)
    torch.library.opcheck(
        torch.ops.motif2.tokens_first.default, (gradient,), test_utils=("test_schema", "test_faketensor")
    )
    assert torch.ops.motif2.tokens_first(gradient).is_contiguous()
